// Streams and resumes an answer with the generated client, and prints what came as JSON.
//
//   node out/client.js ADDRESS TOKEN

import type { MessageInitShape } from "@bufbuild/protobuf";
import { type Client, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { ErrorInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import {
  type Delta, type Final, type GenerateRequestSchema, InferenceService, Role, type Started,
} from "./gen/headrace/inference/v1/inference_pb.js";

type Request = MessageInitShape<typeof GenerateRequestSchema>;

/** After how many deltas the second call continues. */
const RESUMED_AFTER = 5;

/** What one call streamed. */
interface Answer {
  started?: Started;
  deltas: Delta[];
  final?: Final;
}

async function generate(client: Client<typeof InferenceService>, token: string, request: Request): Promise<Answer> {
  const answer: Answer = { deltas: [] };
  const options = { headers: { authorization: `Bearer ${token}` }, timeoutMs: 30_000 };
  for await (const { event } of client.generate(request, options)) {
    if (event.case === "started") answer.started = event.value;
    else if (event.case === "delta") answer.deltas.push(event.value);
    else if (event.case === "final") answer.final = event.value;
  }
  return answer;
}

function errorOf(error: unknown) {
  const failed = ConnectError.from(error);
  const [info] = failed.findDetails(ErrorInfoSchema);
  return info && { code: failed.code, domain: info.domain, reason: info.reason, models: info.metadata["models"] };
}

async function main(address: string, token: string) {
  const client = createClient(InferenceService, createGrpcTransport({ baseUrl: `http://${address}` }));
  const request: Request = {
    model: "smollm2",
    maxTokens: 12n,
    messages: [{ role: Role.USER, parts: [{ content: { case: "text", value: "Name three rivers." } }] }],
  };
  const full = await generate(client, token, request);
  const resumeFrom = full.deltas[RESUMED_AFTER - 1]?.resumeToken;
  const rest = await generate(client, token, { ...request, resumeFrom });
  const error = await generate(client, token, { ...request, model: "nope" }).catch(errorOf);
  console.log(JSON.stringify({
    started: { request_id: full.started?.requestId, model_version: full.started?.modelVersion },
    deltas: full.deltas.map((delta) => delta.text),
    // int64 is a bigint, which JSON does not have.
    final: { request_id: full.final?.requestId, completion_tokens: Number(full.final?.usage?.completionTokens) },
    resumed: rest.deltas.map((delta) => delta.text).join(""),
    error,
  }));
}

const [address, token] = process.argv.slice(2);
if (!address || !token) throw new Error("usage: node out/client.js ADDRESS TOKEN");
await main(address, token);

// Streams one answer with each of Node's usual clients and prints what came as JSON.
//
//   node client.js ADDRESS TOKEN PROTOS

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const OpenAI = require("openai").default;

const [address, token, protos] = process.argv.slice(2);
const question = "Name three rivers.";

function overGrpc() {
  const definition = loader.loadSync("headrace/inference/v1/inference.proto", {
    includeDirs: [protos], keepCase: true, longs: String, enums: String,
  });
  const { InferenceService } = grpc.loadPackageDefinition(definition).headrace.inference.v1;
  const client = new InferenceService(address, grpc.credentials.createInsecure());
  const metadata = new grpc.Metadata();
  metadata.set("authorization", `Bearer ${token}`);
  const request = { model: "smollm2", max_tokens: 12, messages: [{ role: "ROLE_USER", parts: [{ text: question }] }] };
  return new Promise((resolve, reject) => {
    const seen = { started: null, deltas: [], final: null };
    const stream = client.Generate(request, metadata);
    stream.on("data", (message) => {
      if (message.delta) seen.deltas.push(message.delta.text);
      else if (message.started) seen.started = message.started;
      else if (message.final) seen.final = message.final;
    });
    stream.on("error", reject);
    stream.on("end", () => { client.close(); resolve(seen); });
  });
}

async function overOpenAI() {
  const client = new OpenAI({ baseURL: `http://${address}/v1`, apiKey: token });
  const stream = await client.chat.completions.create({
    model: "smollm2", stream: true, max_tokens: 12, stream_options: { include_usage: true },
    messages: [{ role: "user", content: question }],
  });
  const seen = { deltas: [], usage: null };
  for await (const chunk of stream) {
    if (chunk.choices.length && chunk.choices[0].delta.content) seen.deltas.push(chunk.choices[0].delta.content);
    if (chunk.usage) seen.usage = chunk.usage;
  }
  const error = await client.chat.completions
    .create({ model: "nope", messages: [{ role: "user", content: question }] })
    .catch((raised) => ({ status: raised.status, code: raised.code }));
  const embedding = await client.embeddings.create({ model: "minilm", input: "a river" });
  return { ...seen, error, dimensions: embedding.data[0].embedding.length };
}

Promise.all([overGrpc(), overOpenAI()])
  .then(([viaGrpc, viaOpenAI]) => console.log(JSON.stringify({ viaGrpc, viaOpenAI })))
  .catch((error) => { console.error(error); process.exit(1); });

package client;

import com.google.gson.Gson;
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import headrace.inference.v1.Delta;
import headrace.inference.v1.Final;
import headrace.inference.v1.GenerateRequest;
import headrace.inference.v1.GenerateResponse;
import headrace.inference.v1.InferenceServiceGrpc;
import headrace.inference.v1.Message;
import headrace.inference.v1.Part;
import headrace.inference.v1.Role;
import headrace.inference.v1.Started;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;

/** Streams and resumes an answer with the generated client, and prints what came as JSON. */
public final class Main {
  /** After how many deltas the second call continues. */
  private static final int RESUMED_AFTER = 5;

  private final InferenceServiceGrpc.InferenceServiceBlockingStub service;

  private Main(InferenceServiceGrpc.InferenceServiceBlockingStub service) {
    this.service = service;
  }

  /** What one call streamed. */
  private static final class Answer {
    Started started;
    final List<Delta> deltas = new ArrayList<>();
    Final end;

    String text() {
      return deltas.stream().map(Delta::getText).collect(Collectors.joining());
    }
  }

  /** Arguments: ADDRESS TOKEN. */
  public static void main(String[] arguments) throws Exception {
    Metadata headers = new Metadata();
    headers.put(
        Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER),
        "Bearer " + arguments[1]);
    ManagedChannel channel = ManagedChannelBuilder.forTarget(arguments[0]).usePlaintext().build();
    try {
      var service =
          InferenceServiceGrpc.newBlockingStub(channel)
              .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
      System.out.println(new Gson().toJson(new Main(service).run()));
    } finally {
      channel.shutdownNow();
    }
  }

  private Map<String, Object> run() throws InvalidProtocolBufferException {
    Part question = Part.newBuilder().setText("Name three rivers.").build();
    GenerateRequest request =
        GenerateRequest.newBuilder()
            .setModel("smollm2")
            .addMessages(Message.newBuilder().setRole(Role.ROLE_USER).addParts(question))
            .setMaxTokens(12)
            .build();
    Answer full = generate(request);
    String token = full.deltas.get(RESUMED_AFTER - 1).getResumeToken();
    Answer rest = generate(request.toBuilder().setResumeFrom(token).build());
    return Map.of(
        "started",
        Map.of(
            "request_id", full.started.getRequestId(),
            "model_version", full.started.getModelVersion()),
        "deltas",
        full.deltas.stream().map(Delta::getText).collect(Collectors.toList()),
        "final",
        Map.of(
            "request_id", full.end.getRequestId(),
            "completion_tokens", full.end.getUsage().getCompletionTokens()),
        "resumed",
        rest.text(),
        "error",
        errorOf(request.toBuilder().setModel("nope").build()));
  }

  private Answer generate(GenerateRequest request) {
    Answer answer = new Answer();
    Iterator<GenerateResponse> stream =
        service.withDeadlineAfter(30, TimeUnit.SECONDS).generate(request);
    while (stream.hasNext()) {
      GenerateResponse response = stream.next();
      switch (response.getEventCase()) {
        case STARTED -> answer.started = response.getStarted();
        case DELTA -> answer.deltas.add(response.getDelta());
        case FINAL -> answer.end = response.getFinal();
        default -> {} // An event that this client does not know.
      }
    }
    return answer;
  }

  private Map<String, Object> errorOf(GenerateRequest request)
      throws InvalidProtocolBufferException {
    try {
      generate(request);
    } catch (StatusRuntimeException error) {
      for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
        if (detail.is(ErrorInfo.class)) {
          ErrorInfo info = detail.unpack(ErrorInfo.class);
          return Map.of(
              "code", error.getStatus().getCode().value(),
              "domain", info.getDomain(),
              "reason", info.getReason(),
              "models", info.getMetadataOrDefault("models", ""));
        }
      }
    }
    return Map.of();
  }
}

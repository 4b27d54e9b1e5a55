// Streams and resumes an answer with the generated client, and prints what came as JSON.
//
//	client ADDRESS TOKEN
package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"os"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	inference "headrace/gen/headrace/inference/v1"
)

// resumedAfter is the number of deltas after which the second call continues.
const resumedAfter = 5

// answer is what one call streamed.
type answer struct {
	started *inference.Started
	deltas  []*inference.Delta
	final   *inference.Final
}

func (a *answer) texts() []string {
	texts := []string{}
	for _, delta := range a.deltas {
		texts = append(texts, delta.Text)
	}
	return texts
}

func generate(ctx context.Context, client inference.InferenceServiceClient, request *inference.GenerateRequest) (*answer, error) {
	stream, err := client.Generate(ctx, request)
	if err != nil {
		return nil, err
	}
	got := &answer{}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return nil, err
		}
		switch event := response.Event.(type) {
		case *inference.GenerateResponse_Started:
			got.started = event.Started
		case *inference.GenerateResponse_Delta:
			got.deltas = append(got.deltas, event.Delta)
		case *inference.GenerateResponse_Final:
			got.final = event.Final
		} // Other events are skipped.
	}
}

func errorOf(err error) map[string]any {
	failed := status.Convert(err)
	for _, detail := range failed.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return map[string]any{
				"code": int(failed.Code()), "domain": info.Domain, "reason": info.Reason, "models": info.Metadata["models"],
			}
		}
	}
	return nil
}

func run(address, token string) (map[string]any, error) {
	channel, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer channel.Close()
	client := inference.NewInferenceServiceClient(channel)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)

	question := &inference.Part{Content: &inference.Part_Text{Text: "Name three rivers."}}
	request := &inference.GenerateRequest{
		Model:     "smollm2",
		Messages:  []*inference.Message{{Role: inference.Role_ROLE_USER, Parts: []*inference.Part{question}}},
		MaxTokens: proto.Int64(12),
	}
	full, err := generate(ctx, client, request)
	if err != nil {
		return nil, err
	}
	if len(full.deltas) < resumedAfter {
		return nil, errors.New("too few deltas to resume")
	}
	request.ResumeFrom = full.deltas[resumedAfter-1].ResumeToken
	rest, err := generate(ctx, client, request)
	if err != nil {
		return nil, err
	}
	_, unknown := generate(ctx, client, &inference.GenerateRequest{Model: "nope", Messages: request.Messages})
	return map[string]any{
		"started": map[string]any{"request_id": full.started.RequestId, "model_version": full.started.ModelVersion},
		"deltas":  full.texts(),
		"final": map[string]any{
			"request_id": full.final.RequestId, "completion_tokens": full.final.Usage.CompletionTokens,
		},
		"resumed": strings.Join(rest.texts(), ""),
		"error":   errorOf(unknown),
	}, nil
}

func main() {
	seen, err := run(os.Args[1], os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(seen); err != nil {
		log.Fatal(err)
	}
}

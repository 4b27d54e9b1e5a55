//! Streams and resumes an answer with the generated client, and prints what came as JSON.
//!
//!     client ADDRESS TOKEN

use serde_json::{json, Value};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_types::StatusExt;

#[allow(dead_code)] // This program uses a part of the API.
mod protos {
    tonic::include_proto!("protos");
}
use protos::headrace::inference::v1 as inference;

use inference::generate_response::Event;
use inference::inference_service_client::InferenceServiceClient;
use inference::{part::Content, Delta, Final, GenerateRequest, Message, Part, Role, Started};

/// After how many deltas the second call continues.
const RESUMED_AFTER: usize = 5;

/// What one call streamed.
#[derive(Default)]
struct Answer {
    started: Started,
    deltas: Vec<Delta>,
    end: Final,
}

impl Answer {
    fn texts(&self) -> Vec<&str> {
        self.deltas.iter().map(|delta| delta.text.as_str()).collect()
    }
}

struct Client {
    service: InferenceServiceClient<Channel>,
    authorization: String,
}

impl Client {
    async fn generate(&mut self, message: GenerateRequest) -> Result<Answer, Status> {
        let mut request = Request::new(message);
        request.set_timeout(Duration::from_secs(30));
        let authorization = self.authorization.parse().expect("a token is ASCII");
        request.metadata_mut().insert("authorization", authorization);
        let mut stream = self.service.generate(request).await?.into_inner();
        let mut answer = Answer::default();
        while let Some(response) = stream.message().await? {
            match response.event {
                Some(Event::Started(started)) => answer.started = started,
                Some(Event::Delta(delta)) => answer.deltas.push(delta),
                Some(Event::Final(end)) => answer.end = end,
                None => {} // An event that this client does not know.
            }
        }
        Ok(answer)
    }
}

fn error_of(status: &Status) -> Value {
    match status.get_details_error_info() {
        Some(info) => json!({
            "code": status.code() as i32, "domain": info.domain, "reason": info.reason,
            "models": info.metadata.get("models"),
        }),
        None => Value::Null,
    }
}

fn question(model: &str) -> GenerateRequest {
    let text = Content::Text("Name three rivers.".into());
    GenerateRequest {
        model: model.into(),
        messages: vec![Message {
            role: Role::User.into(),
            parts: vec![Part { content: Some(text) }],
        }],
        max_tokens: Some(12),
        ..Default::default()
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let channel = Endpoint::new(format!("http://{}", arguments[1]))?.connect().await?;
    let mut client = Client {
        service: InferenceServiceClient::new(channel),
        authorization: format!("Bearer {}", arguments[2]),
    };
    let full = client.generate(question("smollm2")).await?;
    let resume_from = full.deltas[RESUMED_AFTER - 1].resume_token.clone();
    let rest = client
        .generate(GenerateRequest { resume_from, ..question("smollm2") })
        .await?;
    let unknown = client.generate(question("nope")).await.err();
    let usage = full.end.usage.unwrap_or_default();
    let seen = json!({
        "started": {"request_id": full.started.request_id, "model_version": full.started.model_version},
        "deltas": full.texts(),
        "final": {"request_id": full.end.request_id, "completion_tokens": usage.completion_tokens},
        "resumed": rest.texts().concat(),
        "error": unknown.as_ref().map(error_of),
    });
    println!("{seen}");
    Ok(())
}

//! Every error of a request or an engine has its published code, status, details and incident id, and the
//! process continues.

use hapa_engine_sim::{Fault, Script};
use hapa_proto::codegen::v1::{GenerateCodeRequest, UserProfile};
use hapa_test_harness::{TestMesh, incident, within};
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use crate::api::generate::{question, stream};

#[tokio::test]
async fn wrong_input_names_every_field() {
    let mesh = TestMesh::start().await;
    let profile = UserProfile { explanation_style: "loud".to_owned(), ..UserProfile::default() };
    let cases = [
        (question(""), "E4002", "user_question"),
        (question(&"x".repeat(10_001)), "E4001", "user_question"),
        (GenerateCodeRequest { temperature: Some(3.0), ..question("q") }, "E4001", "temperature"),
        (GenerateCodeRequest { task: "sing".to_owned(), ..question("q") }, "E4001", "task"),
        (
            GenerateCodeRequest { user_profile: Some(profile), ..question("q") },
            "E4001",
            "user_profile.explanation_style",
        ),
    ];
    for (request, code, field) in cases {
        let status = mesh.client().generate_code(request.clone()).await.unwrap_err();
        assert_eq!((incident(&status).0.as_str(), status.code()), (code, Code::InvalidArgument));
        let details = status.get_details_bad_request().unwrap();
        assert_eq!(details.field_violations[0].field, field);
        let streamed = stream(&mut mesh.client(), request).await.status.unwrap();
        assert_eq!(incident(&streamed).0, code);
    }
    assert_eq!(mesh.engine.counts().started, 0, "none of them reached the engine");
    mesh.finish().await;
}

#[tokio::test]
async fn every_engine_failure_before_the_first_token_is_a_plain_status() {
    let mesh = TestMesh::start().await;
    let cases = [
        // First, because a request is sent once more after a connection that was used before.
        (Fault::CutBeforeHeaders, "E5006", Code::Unavailable),
        (Fault::status(500), "E5006", Code::Unavailable),
        (Fault::status(401), "E5006", Code::Unavailable),
        (Fault::status(503), "E5005", Code::Unavailable),
        (Fault::too_many_requests(7), "E5005", Code::Unavailable),
    ];
    for (fault, code, grpc) in cases {
        mesh.engine.once(fault.clone());
        let read = stream(&mut mesh.client(), question("q")).await;
        assert!(read.started.is_none(), "{fault:?} must not begin a stream");
        let status = read.status.unwrap();
        assert_eq!((incident(&status).0.as_str(), status.code()), (code, grpc), "{fault:?}");
        if let Fault::Status { retry_after: Some(seconds), .. } = fault {
            let delay = status.get_details_retry_info().unwrap().retry_delay.unwrap();
            assert_eq!(delay.as_secs(), u64::from(seconds));
            assert_eq!(status.metadata().get("retry-after").unwrap(), "7");
        }
    }
    mesh.engine.stop().await;
    let status = mesh.client().generate_code(question("q")).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E5006", Code::Unavailable));
    mesh.engine.resume();
    assert!(mesh.client().generate_code(question("q")).await.is_ok(), "the process lives on");
    mesh.finish().await;
}

#[tokio::test]
async fn a_stream_that_broke_ends_with_failed_and_the_same_status() {
    let mesh = TestMesh::start().await;
    let three = || Script::tokens(["one ", "two ", "three"]);
    let cases = [
        three().fault(Fault::CutAfter(2)),
        three().fault(Fault::EndAfter(2)),
        three().fault(Fault::ErrorAfter(2)),
        three().fault(Fault::EndlessLineAfter(2)),
        three().without_finish(),
    ];
    for script in cases {
        mesh.engine.once(script.clone());
        let read = stream(&mut mesh.client(), question("q")).await;
        assert!(read.explanation.starts_with("one two "), "{script:?}: {:?}", read.explanation);
        let (failed, status) = (read.failed.unwrap(), read.status.unwrap());
        assert_eq!((failed.error_code.as_str(), failed.partial), ("E5007", true), "{script:?}");
        assert_eq!(incident(&status), ("E5007".to_owned(), failed.incident_id));
        assert_eq!(status.code(), Code::Unavailable);
        assert!(read.finished.is_none());
        mesh.engine.once(script);
        let status = mesh.client().generate_code(question("q")).await.unwrap_err();
        assert_eq!(incident(&status).0, "E5007");
    }
    mesh.engine.once(three().fault(Fault::ErrorAfter(0)));
    let read = stream(&mut mesh.client(), question("q")).await;
    assert_eq!(incident(&read.status.unwrap()).0, "E5006", "no text was sent");
    assert!(read.failed.is_none_or(|failed| !failed.partial), "the stream need not have started");
    mesh.finish().await;
}

#[tokio::test]
async fn unknown_models_and_long_prompts_are_the_callers_to_mend() {
    let mesh = TestMesh::start().await;
    let unknown = GenerateCodeRequest { model: "gpt".to_owned(), ..question("q") };
    let status = mesh.client().generate_code(unknown).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4010", Code::NotFound));
    let long = GenerateCodeRequest {
        code_context: "x".repeat(50_000),
        max_tokens: Some(4_096),
        ..question(&"y".repeat(10_000))
    };
    mesh.finish().await;
    let mesh = TestMesh::with_engine(hapa_engine_sim::Setup {
        max_model_len: 4_096,
        ..Default::default()
    })
    .await;
    let status = mesh.client().generate_code(long).await.unwrap_err();
    assert_eq!((incident(&status).0.as_str(), status.code()), ("E4001", Code::InvalidArgument));
    assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "code_context");
    mesh.finish().await;
}

#[tokio::test]
async fn malformed_and_oversized_messages_and_unknown_methods_are_published_too() {
    let mesh = TestMesh::start().await;
    let generate = "/hapa.codegen.v1.CodegenService/GenerateCode";
    let malformed = raw(&mesh, generate, vec![0x0a, 0xff]).await;
    assert_eq!(
        (incident(&malformed).0.as_str(), malformed.code()),
        ("E4001", Code::InvalidArgument)
    );
    let large = raw(&mesh, generate, vec![0; 5 * 1024 * 1024]).await;
    assert_eq!((incident(&large).0.as_str(), large.code()), ("E4006", Code::ResourceExhausted));
    for unknown in ["/hapa.codegen.v1.CodegenService/Sing", "/hapa.nothing.v1.Nothing/Nothing"] {
        let status = raw(&mesh, unknown, Vec::new()).await;
        assert_eq!((incident(&status).0.as_str(), status.code()), ("E4012", Code::Unimplemented));
    }
    let mut json = tokio::process::Command::new("curl");
    json.args([
        "--silent",
        "--show-error",
        "--http2-prior-knowledge",
        "--dump-header",
        "-",
        "--request",
        "POST",
    ]);
    json.args(["--header", "content-type: application/json"])
        .arg(format!("http://{}{generate}", mesh.address));
    let reply = within("curl", json.output()).await.unwrap();
    let headers = String::from_utf8(reply.stdout).unwrap();
    assert!(headers.contains(&format!("grpc-status: {}", Code::Unimplemented as i32)), "{headers}");
    let mut bad_timeout = Request::new(question("q"));
    bad_timeout.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    let status = mesh.client().generate_code(bad_timeout).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4001");
    assert!(mesh.client().generate_code(question("q")).await.is_ok(), "the process lives on");
    mesh.finish().await;
}

/// Sends bytes as a message.
async fn raw(mesh: &TestMesh, path: &'static str, bytes: Vec<u8>) -> Status {
    let mut grpc = Grpc::new(mesh.connect().await).max_encoding_message_size(usize::MAX);
    grpc.ready().await.unwrap();
    let mut request = Request::new(bytes);
    request.metadata_mut().insert("x-api-key", mesh.key.parse().unwrap());
    grpc.unary(request, path.parse().unwrap(), Raw).await.unwrap_err()
}

/// Any bytes.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = ();
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, bytes: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(buffer, &bytes);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = ();
    type Error = Status;

    fn decode(&mut self, _: &mut DecodeBuf<'_>) -> Result<Option<()>, Status> {
        Ok(Some(()))
    }
}

//! Code validation without execution: by RPC, in answers, and from the command line. Invisible characters are
//! in no prompt and no answer.

use hapa_engine_sim::Script;
use hapa_proto::auth::v1::{CreateKeyRequest, RateLimit};
use hapa_proto::codegen::v1::{GenerateCodeRequest, ValidateCodeRequest};
use hapa_test_harness::{TestMesh, hapa, incident, within};
use serde_json::{Value, json};

use crate::api::generate::{question, stream};

fn python(code: &str) -> ValidateCodeRequest {
    ValidateCodeRequest { code: code.to_owned(), ..ValidateCodeRequest::default() }
}

#[tokio::test]
async fn dangerous_code_is_reported_by_line_without_the_engine() {
    let mesh = TestMesh::start().await;
    let code = "import os as o\n\ndef f(x):\n    # os.system(x)\n    o.system(x)\n";
    let reply = mesh.client().validate_code(python(code)).await.unwrap().into_inner();
    assert_eq!((reply.status.as_str(), reply.is_valid), ("invalid", false));
    let [issue] = &reply.issues[..] else { panic!("{reply:?}") };
    assert_eq!((issue.line_number, issue.column_number), (5, 5));
    assert_eq!(
        (issue.severity.as_str(), issue.issue_type.as_str()),
        ("critical", "shell_execution")
    );
    assert_eq!((reply.critical_count, reply.functions_count), (1, Some(1)));
    let status = mesh.client().validate_code(python(" ")).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4002");
    let wrong = ValidateCodeRequest { language: "cobol".to_owned(), ..python("x") };
    let status = mesh.client().validate_code(wrong).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4001");
    assert_eq!(mesh.engine.counts().started, 0);
    mesh.finish().await;
}

#[tokio::test]
async fn the_documented_json_of_a_validation_goes_in_and_comes_out() {
    let mesh = TestMesh::start().await;
    let gateway = mesh.gateway(&[]).await;
    let asked = json!({
        "code": "def f(:\n    pass\n", "language": "py", "file_name": "a.py", "check_execution": true,
        "check_style": true, "session_id": "s", "context": "of the original",
    });
    // The mesh's own key has no limits.
    let limited = CreateKeyRequest { rate_limits: Vec::new(), ..TestMesh::dev_key() };
    let key = mesh.create_key(limited).await.key_text;
    let reply = gateway.post("/api/v1/validate", Some(&key), &asked).await;
    assert_eq!(reply.status(), 200);
    assert_eq!(reply.headers()["ratelimit-limit"], "100");
    let reply: Value = serde_json::from_str(&reply.text().await.unwrap()).unwrap();
    assert!(reply["validation_id"].as_str().unwrap().starts_with("val_"), "{reply}");
    assert_eq!((&reply["status"], &reply["is_valid"]), (&json!("invalid"), &json!(false)));
    assert_eq!((&reply["language"], &reply["lines_of_code"]), (&json!("python"), &json!(2)));
    let first = &reply["issues"][0];
    assert_eq!((&first["line_number"], &first["issue_type"]), (&json!(1), &json!("syntax_error")));
    assert_eq!(first["severity"], "error");
    assert!(first["message"].is_string() && first["suggestion"].is_string());
    mesh.finish().await;
}

#[tokio::test]
async fn a_key_may_have_a_limit_of_its_own_for_validations() {
    let mesh = TestMesh::start().await;
    let limit = RateLimit { method: "ValidateCode".to_owned(), limit: 1, window_seconds: 60 };
    let key =
        mesh.create_key(CreateKeyRequest { rate_limits: vec![limit], ..TestMesh::dev_key() }).await;
    let mut client = mesh.client_with(&key.key_text);
    client.validate_code(python("x = 1")).await.unwrap();
    let status = client.validate_code(python("x = 1")).await.unwrap_err();
    assert_eq!(incident(&status).0, "E4004");
    mesh.finish().await;
}

const ANSWER: &str =
    "답입니다.\n```python\nimport os\nos.system(x)\n```\n다음:\n```\nprint(1\n```\n끝.";
const SHELL: &str = "line 2: os.system runs its argument in a shell";

#[tokio::test]
async fn answers_carry_warnings_in_the_stream_and_in_one_reply() {
    let mesh = TestMesh::start().await;
    mesh.engine.script(Script::text(ANSWER));
    let finished = stream(&mut mesh.client(), question("q")).await.finished.unwrap();
    assert_eq!((finished.warnings[0].as_str(), finished.warnings.len()), (SHELL, 2));
    assert!(finished.warnings[1].starts_with("line 3: "), "{:?}", finished.warnings);
    let reply = mesh.client().generate_code(question("q")).await.unwrap().into_inner();
    assert_eq!(reply.warnings, finished.warnings);
    // What was cut off has no syntax errors.
    mesh.engine.script(Script::text(ANSWER).finish("length"));
    let finished = stream(&mut mesh.client(), question("q")).await.finished.unwrap();
    assert_eq!(finished.warnings, [SHELL]);
    mesh.engine.script(Script::text("```python\nprint('eval(x)')\n```\n"));
    let finished = stream(&mut mesh.client(), question("q")).await.finished.unwrap();
    assert_eq!(finished.warnings, Vec::<String>::new());
    mesh.finish().await;
}

#[tokio::test]
async fn invisible_characters_are_in_no_prompt_and_no_answer() {
    let mesh = TestMesh::start().await;
    let answer = "보\u{200b}기 👩\u{200d}💻\n```python\nx = '\u{202e}a\u{e0041}'\n```\n";
    mesh.engine.script(Script::tokens(answer.split_inclusive(|_| true)));
    let request = GenerateCodeRequest {
        code_context: "a = 1\u{2066}".to_owned(),
        ..question("인\u{e0049}\u{200b}사 👩\u{200d}💻")
    };
    let read = stream(&mut mesh.client(), request).await;
    assert_eq!(read.explanation, "보기 👩\u{200d}💻\n");
    assert_eq!(read.code, "x = 'a'\n");
    let warnings = read.finished.unwrap().warnings;
    assert_eq!(warnings, ["invisible characters were removed from the answer"]);
    let prompt =
        mesh.engine.requests()[0].body["messages"][1]["content"].as_str().unwrap().to_owned();
    assert!(prompt.starts_with("인사 👩\u{200d}💻\n") && prompt.contains("a = 1\n"), "{prompt:?}");
    mesh.finish().await;
}

#[tokio::test]
async fn the_command_reports_each_file_and_exits_with_1_if_one_is_invalid() {
    let mesh = TestMesh::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, code: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, code).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (good, bad) = (file("good.py", "x = 1\n"), file("bad.js", "let x;\neval(x);\n"));
    let odd = file("odd.txt", "x = 1\n");
    let run = async |arguments: &[&str]| {
        let mut command = hapa();
        command.arg("validate").args(arguments);
        command
            .env("HAPA_ADDRESS", format!("http://{}", mesh.address))
            .env("HAPA_API_KEY", &mesh.key);
        let done = within("hapa validate", command.output()).await.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (done.status.code(), text(done.stdout), text(done.stderr))
    };
    let (code, out, words) = run(&[&good]).await;
    assert_eq!((code, out.as_str()), (Some(0), ""), "{words}");
    let (code, out, words) = run(&[&good, &bad]).await;
    assert_eq!(code, Some(1));
    assert!(out.contains("dynamic_code") && out.contains("critical"), "{out}");
    assert!(words.contains("1 of 2 files are not valid"), "{words}");
    let (code, out, _) = run(&[&bad, "--json"]).await;
    let reply: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &reply["issues"][0]["line_number"]), (Some(1), &json!(2)));
    let (code, _, words) = run(&[&odd]).await;
    assert!(code == Some(1) && words.contains("--language"), "{words}");
    assert_eq!(run(&[&odd, "--language", "python"]).await.0, Some(0));
    mesh.finish().await;
}

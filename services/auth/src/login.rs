//! Reads the proof of a login request: from the fields of the gRPC message, or from the JSON body of an
//! HTTP request.
//!
//! Invariant: no error repeats any part of the body, which may hold a secret anywhere.

use hapa_core::violations::Violations;
use hapa_proto::auth::v1::CreateSessionRequest;
use hapa_proto::auth::v1::create_session_request::{Password, Proof};
use serde::Deserialize;
use serde_json::Value;

/// The JSON body of an HTTP client, as `CreateSessionRequest` in session.proto documents it.
#[derive(Deserialize)]
struct LoginBody {
    email: Option<String>,
    /// A string, or a [`PasswordObject`].
    password: Option<Value>,
    #[serde(alias = "idToken")]
    id_token: Option<String>,
}

/// The object form of the field `password`.
#[derive(Deserialize)]
struct PasswordObject {
    email: Option<String>,
    password: Option<String>,
}

/// The proof of a request. A request with an HTTP body must have no other proof: that would come from
/// the URL, which must not hold a secret.
pub(crate) fn parse_proof(request: CreateSessionRequest) -> Result<Proof, Violations> {
    let proof = match (request.proof, request.http_body) {
        (proof, None) => proof,
        (None, Some(body)) if body.data.is_empty() => None,
        (None, Some(body)) => parse_body(&body.data)?,
        (Some(_), Some(_)) => return Err(ambiguous_login()),
    };
    proof.ok_or_else(|| {
        let mut violations = Violations::default();
        violations.add_missing("password");
        violations
    })
}

fn parse_body(body: &[u8]) -> Result<Option<Proof>, Violations> {
    // serde would accept an array for a struct too.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(invalid_body());
    }
    // The errors of serde_json are dropped, because they repeat parts of the body.
    let body: LoginBody = serde_json::from_slice(body).map_err(|_| invalid_body())?;
    let (inner_email, password) = match body.password {
        None => (None, None),
        Some(Value::String(password)) => (None, Some(password)),
        Some(object @ Value::Object(_)) => {
            let nested: PasswordObject =
                serde_json::from_value(object).map_err(|_| invalid_body())?;
            (nested.email, Some(nested.password.unwrap_or_default()))
        }
        Some(_) => return Err(invalid_body()),
    };
    let email = match (body.email, inner_email) {
        (Some(outer), Some(inner)) if outer != inner => return Err(ambiguous_login()),
        (outer, inner) => outer.or(inner),
    };
    match (email, password, body.id_token) {
        (None, None, None) => Ok(None),
        (None, None, Some(token)) => Ok(Some(Proof::IdToken(token))),
        (email, password, None) => {
            let (email, password) = (email.unwrap_or_default(), password.unwrap_or_default());
            Ok(Some(Proof::Password(Password { email, password })))
        }
        _ => Err(ambiguous_login()),
    }
}

fn invalid_body() -> Violations {
    let problem = "must be a JSON object with the string fields email and password, or id_token";
    Violations::single("body", problem)
}

fn ambiguous_login() -> Violations {
    Violations::single(
        "body",
        "or the URL holds two proofs or two email addresses; send one, in the body",
    )
}

#[cfg(test)]
mod tests {
    use hapa_proto::google::api::HttpBody;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn request(data: impl Into<Vec<u8>>) -> CreateSessionRequest {
        let http_body = Some(HttpBody { data: data.into(), ..HttpBody::default() });
        CreateSessionRequest { http_body, ..CreateSessionRequest::default() }
    }

    fn proof_of_body(body: &Value) -> Result<Proof, String> {
        parse_proof(request(body.to_string())).map_err(|violations| violations.to_string())
    }

    fn password(email: &str, password: &str) -> Proof {
        Proof::Password(Password { email: email.to_owned(), password: password.to_owned() })
    }

    #[test]
    fn a_body_is_flat_or_nested_or_holds_an_id_token() {
        let kim = password("kim@example.com", "s3cret");
        for body in [
            json!({ "email": "kim@example.com", "password": "s3cret" }),
            json!({ "email": "kim@example.com", "password": "s3cret", "remember": [true] }),
            json!({ "password": { "email": "kim@example.com", "password": "s3cret" } }),
            json!({ "email": "kim@example.com", "password": { "password": "s3cret" } }),
            json!({ "email": "kim@example.com", "password": { "email": "kim@example.com", "password": "s3cret" } }),
            json!({ "email": "kim@example.com", "password": "s3cret", "id_token": null }),
        ] {
            assert_eq!(proof_of_body(&body), Ok(kim.clone()), "{body}");
        }
        for name in ["id_token", "idToken"] {
            assert_eq!(
                proof_of_body(&json!({ name: "a.b.c" })),
                Ok(Proof::IdToken("a.b.c".to_owned()))
            );
        }
        assert_eq!(
            proof_of_body(&json!({ "email": "kim@example.com" })),
            Ok(password("kim@example.com", ""))
        );
        assert_eq!(proof_of_body(&json!({ "password": "s3cret" })), Ok(password("", "s3cret")));
        for empty in ["", "{}", r#"{"password":null}"#] {
            assert_eq!(
                parse_proof(request(empty)).unwrap_err().to_string(),
                "password is required"
            );
        }
    }

    #[test]
    fn a_message_has_either_a_proof_or_a_body() {
        let body = json!({ "email": "kim@example.com", "password": "s3cret" }).to_string();
        let kim = password("kim@example.com", "s3cret");
        let message =
            CreateSessionRequest { proof: Some(kim.clone()), ..CreateSessionRequest::default() };
        assert_eq!(parse_proof(message.clone()).unwrap(), kim);
        for body in [body, String::new()] {
            let both = CreateSessionRequest { proof: Some(kim.clone()), ..request(body) };
            assert_eq!(parse_proof(both).unwrap_err().fields(), ["body"]);
        }
    }

    #[test]
    fn ambiguous_and_malformed_bodies_are_rejected_and_never_repeated() {
        let bodies = [
            r#"{"email":"s3cret@a","password":{"email":"s3cret@b","password":"s3cret"}}"#,
            r#"{"email":"s3cret@a","password":"s3cret","id_token":"s3cret"}"#,
            r#"{"id_token":"s3cret","idToken":"s3cret"}"#,
            r#"{"password":"s3cret","password":"s3cret"}"#,
            r#"{"password":["s3cret"]}"#,
            r#"{"password":{"password":{"s3cret":1}}}"#,
            r#"{"email":{"s3cret":1},"password":"s3cret"}"#,
            r#"{"password":"s3cret" "#,
            r#"{"password":"s3cret"} s3cret"#,
            r#"["s3cret"]"#,
            r#"["a@b","s3cret",null]"#,
            r#"{"password":["a@b","s3cret"]}"#,
            r#"{"password":true,"email":"s3cret"}"#,
            r#""s3cret""#,
            "s3cret",
            "email=s3cret&password=s3cret",
        ];
        for body in bodies {
            let violations = parse_proof(request(body)).unwrap_err();
            assert_eq!(violations.fields(), ["body"], "{body}");
            assert!(!violations.to_string().contains("s3cret"), "{violations}");
        }
        let invalid = [br#"{"password":""#, &[0xff][..], br#""}"#].concat();
        assert_eq!(parse_proof(request(invalid)).unwrap_err().fields(), ["body"]);
        assert_eq!(parse_proof(request(vec![b'['; 100_000])).unwrap_err().fields(), ["body"]);
    }

    proptest! {
        #[test]
        fn an_arbitrary_body_never_panics_and_is_never_repeated(noise in "[{}\\[\\]:,\"a-z ]{0,40}") {
            let body = format!("{noise}marker-of-a-secret{noise}");
            if let Err(violations) = parse_proof(request(body)) {
                prop_assert!(!violations.to_string().contains("marker-of-a-secret"));
            }
        }

        #[test]
        fn any_email_and_password_are_read_unchanged(email in "\\PC{0,20}", text in "\\PC{0,20}") {
            let flat = json!({ "email": email, "password": text });
            prop_assert_eq!(proof_of_body(&flat), Ok(password(&email, &text)));
            prop_assert_eq!(proof_of_body(&json!({ "password": flat })), Ok(password(&email, &text)));
        }
    }
}

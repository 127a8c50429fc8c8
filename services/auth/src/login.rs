//! The proof in a request to log in: the message's own field, or the JSON body of an HTTP request.
//!
//! Invariant: no error repeats anything of the body, which holds a secret wherever it is wrong.

use hapa_core::violations::Violations;
use hapa_proto::auth::v1::CreateSessionRequest;
use hapa_proto::auth::v1::create_session_request::{Password, Proof};
use serde::Deserialize;
use serde_json::Value;

/// What an HTTP client sends, as the request's documentation describes it.
#[derive(Deserialize)]
struct Body {
    email: Option<String>,
    /// A text, or an object with the address beside it.
    password: Option<Value>,
    #[serde(alias = "idToken")]
    id_token: Option<String>,
}

/// The object that the field `password` may be.
#[derive(Deserialize)]
struct Nested {
    email: Option<String>,
    password: Option<String>,
}

/// The one proof of a request. Beside a body there is none: it would come from the URL, which is no
/// place for a secret.
pub(crate) fn proof(request: CreateSessionRequest) -> Result<Proof, Violations> {
    let proof = match (request.proof, request.http_body) {
        (proof, None) => proof,
        (None, Some(body)) if body.data.is_empty() => None,
        (None, Some(body)) => read(&body.data)?,
        (Some(_), Some(_)) => return Err(contradiction()),
    };
    proof.ok_or_else(|| {
        let mut found = Violations::default();
        found.missing("password");
        found
    })
}

fn read(body: &[u8]) -> Result<Option<Proof>, Violations> {
    // serde takes an array for a struct too.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(unreadable());
    }
    // The messages of serde_json repeat what was sent.
    let body: Body = serde_json::from_slice(body).map_err(|_| unreadable())?;
    let (inner_email, password) = match body.password {
        None => (None, None),
        Some(Value::String(password)) => (None, Some(password)),
        Some(object @ Value::Object(_)) => {
            let nested: Nested = serde_json::from_value(object).map_err(|_| unreadable())?;
            (nested.email, Some(nested.password.unwrap_or_default()))
        }
        Some(_) => return Err(unreadable()),
    };
    let email = match (body.email, inner_email) {
        (Some(outer), Some(inner)) if outer != inner => return Err(contradiction()),
        (outer, inner) => outer.or(inner),
    };
    match (email, password, body.id_token) {
        (None, None, None) => Ok(None),
        (None, None, Some(token)) => Ok(Some(Proof::IdToken(token))),
        (email, password, None) => {
            let (email, password) = (email.unwrap_or_default(), password.unwrap_or_default());
            Ok(Some(Proof::Password(Password { email, password })))
        }
        _ => Err(contradiction()),
    }
}

fn unreadable() -> Violations {
    let problem = "must be a JSON object with the text fields email and password, or id_token";
    Violations::one("body", problem)
}

fn contradiction() -> Violations {
    Violations::one(
        "body",
        "or the URL names two ways to log in, or two addresses; send only one, in the body",
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

    fn of(body: &Value) -> Result<Proof, String> {
        proof(request(body.to_string())).map_err(|wrong| wrong.to_string())
    }

    fn password(email: &str, password: &str) -> Proof {
        Proof::Password(Password { email: email.to_owned(), password: password.to_owned() })
    }

    #[test]
    fn a_body_is_flat_or_nested_or_an_id_token() {
        let kim = password("kim@example.com", "s3cret");
        for body in [
            json!({ "email": "kim@example.com", "password": "s3cret" }),
            json!({ "email": "kim@example.com", "password": "s3cret", "remember": [true] }),
            json!({ "password": { "email": "kim@example.com", "password": "s3cret" } }),
            json!({ "email": "kim@example.com", "password": { "password": "s3cret" } }),
            json!({ "email": "kim@example.com", "password": { "email": "kim@example.com", "password": "s3cret" } }),
            json!({ "email": "kim@example.com", "password": "s3cret", "id_token": null }),
        ] {
            assert_eq!(of(&body), Ok(kim.clone()), "{body}");
        }
        for name in ["id_token", "idToken"] {
            assert_eq!(of(&json!({ name: "a.b.c" })), Ok(Proof::IdToken("a.b.c".to_owned())));
        }
        assert_eq!(of(&json!({ "email": "kim@example.com" })), Ok(password("kim@example.com", "")));
        assert_eq!(of(&json!({ "password": "s3cret" })), Ok(password("", "s3cret")));
        for empty in ["", "{}", r#"{"password":null}"#] {
            assert_eq!(proof(request(empty)).unwrap_err().to_string(), "password is required");
        }
    }

    #[test]
    fn a_message_has_a_proof_or_a_body() {
        let body = json!({ "email": "kim@example.com", "password": "s3cret" }).to_string();
        let kim = password("kim@example.com", "s3cret");
        let own =
            CreateSessionRequest { proof: Some(kim.clone()), ..CreateSessionRequest::default() };
        assert_eq!(proof(own.clone()).unwrap(), kim);
        for body in [body, String::new()] {
            let both = CreateSessionRequest { proof: Some(kim.clone()), ..request(body) };
            assert_eq!(proof(both).unwrap_err().fields(), ["body"]);
        }
    }

    #[test]
    fn what_contradicts_itself_or_is_no_such_object_is_refused_and_never_repeated() {
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
            let wrong = proof(request(body)).unwrap_err();
            assert_eq!(wrong.fields(), ["body"], "{body}");
            assert!(!wrong.to_string().contains("s3cret"), "{wrong}");
        }
        let invalid = [br#"{"password":""#, &[0xff][..], br#""}"#].concat();
        assert_eq!(proof(request(invalid)).unwrap_err().fields(), ["body"]);
        assert_eq!(proof(request(vec![b'['; 100_000])).unwrap_err().fields(), ["body"]);
    }

    proptest! {
        #[test]
        fn a_made_up_body_never_panics_and_is_never_repeated(noise in "[{}\\[\\]:,\"a-z ]{0,40}") {
            let body = format!("{noise}marker-of-a-secret{noise}");
            if let Err(wrong) = proof(request(body)) {
                prop_assert!(!wrong.to_string().contains("marker-of-a-secret"));
            }
        }

        #[test]
        fn any_address_and_password_come_through(email in "\\PC{0,20}", text in "\\PC{0,20}") {
            let flat = json!({ "email": email, "password": text });
            prop_assert_eq!(of(&flat), Ok(password(&email, &text)));
            prop_assert_eq!(of(&json!({ "password": flat })), Ok(password(&email, &text)));
        }
    }
}

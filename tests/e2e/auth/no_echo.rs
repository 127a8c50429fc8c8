//! No refusal of auth repeats a value that its caller sent: it may be a secret in the wrong field.
//!
//! Requests are made from the descriptor set, so that an RPC or a field that is new is tried too.

use bytes::{Buf, BufMut, Bytes};
use hapa_proto::FILE_DESCRIPTOR_SET;
use hapa_test_harness::{Identity, TestChannel, TestMesh, within};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};
use prost_types::field_descriptor_proto::Type;
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorSet};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Request, Status};

/// Values of every text field: a valid email address, name and password, and an invalid one.
const MARKERS: [&str; 2] = ["marker-of-a-secret@example.com", "marker of a \"secret\""];
const NUMBER: u64 = 987_654_321;
/// How deep messages in messages are filled.
const DEPTH: usize = 3;

struct Schema(FileDescriptorSet);

impl Schema {
    fn read() -> Schema {
        Schema(FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap())
    }

    /// The unary RPCs of auth, and the types of their requests.
    fn rpcs(&self) -> Vec<(String, String)> {
        let mut rpcs = Vec::new();
        for file in self.0.file.iter().filter(|file| file.package() == "hapa.auth.v1") {
            for service in &file.service {
                let unary = service.method.iter().filter(|method| !method.server_streaming());
                rpcs.extend(unary.map(|method| {
                    let path = format!("/hapa.auth.v1.{}/{}", service.name(), method.name());
                    (path, method.input_type().to_owned())
                }));
            }
        }
        rpcs
    }

    fn message(&self, name: &str) -> &DescriptorProto {
        for file in &self.0.file {
            let package = format!(".{}", file.package());
            for message in &file.message_type {
                let path = format!("{package}.{}", message.name());
                if path == name {
                    return message;
                }
                let nested = &message.nested_type;
                let found =
                    nested.iter().find(|nested| format!("{path}.{}", nested.name()) == name);
                if let Some(found) = found {
                    return found;
                }
            }
        }
        panic!("there is no message {name}")
    }

    /// A message with every field set, or the `only` one that is named.
    fn filled(&self, name: &str, marker: &str, only: Option<&str>, depth: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for field in &self.message(name).field {
            if only.is_none_or(|only| only == field.name()) {
                self.fill(field, marker, depth, &mut bytes);
            }
        }
        bytes
    }

    fn fill(&self, field: &FieldDescriptorProto, marker: &str, depth: usize, bytes: &mut Vec<u8>) {
        let number = u32::try_from(field.number()).unwrap();
        let mut text = |text: &[u8]| {
            encode_key(number, WireType::LengthDelimited, bytes);
            encode_varint(text.len() as u64, bytes);
            bytes.extend_from_slice(text);
        };
        match field.r#type() {
            Type::String | Type::Bytes => text(marker.as_bytes()),
            Type::Message if depth > 0 => {
                text(&self.filled(field.type_name(), marker, None, depth - 1));
            }
            Type::Message => {}
            Type::Bool | Type::Enum => {
                encode_key(number, WireType::Varint, bytes);
                encode_varint(1, bytes);
            }
            Type::Int32 | Type::Int64 | Type::Uint32 | Type::Uint64 => {
                encode_key(number, WireType::Varint, bytes);
                encode_varint(NUMBER, bytes);
            }
            other => panic!("{} is of the type {other:?}", field.name()),
        }
    }
}

/// A codec that passes bytes unchanged.
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
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
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

async fn call(wire: TestChannel, path: &str, request: Vec<u8>) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(wire);
    grpc.ready().await.unwrap();
    let request = Request::new(Bytes::from(request));
    within(path, grpc.unary(request, path.parse().unwrap(), Raw)).await.map(drop)
}

/// Whether the message, details or metadata of a refusal contain a sent value.
fn repeats(status: &Status) -> bool {
    let details = String::from_utf8_lossy(status.details()).into_owned();
    let said = format!("{} {details} {:?}", status.message(), status.metadata()).to_lowercase();
    ["marker", "of-a-secret", &NUMBER.to_string()].iter().any(|part| said.contains(part))
}

#[tokio::test]
async fn no_refusal_of_auth_repeats_what_its_caller_sent() {
    let mesh = TestMesh::start_with(&["--auth-failure-limit=0"]).await;
    let kim = mesh.log_in_new_user("kim@example.com", &["codegen:generate"]).await;
    let (schema, mut refused) = (Schema::read(), 0);
    for (path, input) in schema.rpcs() {
        let fields = schema.message(&input).field.iter();
        let each: Vec<_> = fields.map(|field| Some(field.name().to_owned())).collect();
        for only in each.into_iter().chain([None]) {
            for marker in MARKERS {
                for identity in [Identity::Mesh, Identity::Session(&kim.access_token)] {
                    let request = schema.filled(&input, marker, only.as_deref(), DEPTH);
                    let Err(status) = call(mesh.channel_as(identity), &path, request).await else {
                        continue;
                    };
                    assert!(!repeats(&status), "{path} with {only:?}: {status:?}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 100, "{refused} calls were refused");
    mesh.finish().await;
}

#[tokio::test]
async fn what_conflicts_or_is_refused_for_its_holder_is_not_repeated() {
    let mesh = TestMesh::start().await;
    let kim = mesh.log_in_new_user("kim@example.com", &["codegen:generate"]).await;
    let marked = mesh.log_in_new_user(MARKERS[0], &[]).await;
    let users = |identity: Identity<'_>| {
        hapa_proto::auth::v1::user_service_client::UserServiceClient::new(mesh.channel_as(identity))
    };
    let again = hapa_proto::auth::v1::CreateUserRequest {
        email: MARKERS[0].to_owned(),
        ..Default::default()
    };
    let change = |path: &str| hapa_proto::auth::v1::UpdateUserRequest {
        user_id: "me".to_owned(),
        update_mask: Some(prost_types::FieldMask { paths: vec![path.to_owned()] }),
        email: MARKERS[0].to_owned(),
        password: MARKERS[0].to_owned(),
        current_password: MARKERS[0].to_owned(),
        ..Default::default()
    };
    let taken = hapa_proto::auth::v1::UpdateUserRequest {
        user_id: kim.user.user_id.clone(),
        ..change("email")
    };
    let key = |owner: &str, scope: &str| hapa_proto::auth::v1::CreateKeyRequest {
        name: MARKERS[0].to_owned(),
        owner: owner.to_owned(),
        scopes: vec![scope.to_owned()],
        ..Default::default()
    };
    let own = || Identity::Session(&kim.access_token);
    let mut keys =
        hapa_proto::auth::v1::key_service_client::KeyServiceClient::new(mesh.channel_as(own()));
    let refused = [
        ("E4009", users(Identity::Mesh).create_user(again).await.unwrap_err()),
        ("E4009", users(Identity::Mesh).update_user(taken).await.unwrap_err()),
        ("E4005", users(own()).update_user(change("email")).await.unwrap_err()),
        ("E4003", users(own()).update_user(change("password")).await.unwrap_err()),
        ("E4003", mesh.log_in(MARKERS[0], MARKERS[0]).await.unwrap_err()),
        ("E4005", keys.create_key(key(MARKERS[0], "codegen:generate")).await.unwrap_err()),
        ("E4005", keys.create_key(key("", "cache:admin")).await.unwrap_err()),
    ];
    for (code, status) in &refused {
        assert_eq!(hapa_test_harness::incident(status).0, *code, "{status:?}");
        assert!(!repeats(status) && !status.message().contains("cache:admin"), "{status:?}");
    }
    assert!(!marked.user.user_id.is_empty());
    mesh.finish().await;
}

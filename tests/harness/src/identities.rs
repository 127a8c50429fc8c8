//! The identities of clients: no credential, the mesh token, a key, or a session.

use hapa_proto::auth::v1::create_session_request::{Password, Proof};
use hapa_proto::auth::v1::session_service_client::SessionServiceClient;
use hapa_proto::auth::v1::user_service_client::UserServiceClient;
use hapa_proto::auth::v1::{CreateSessionRequest, CreateSessionResponse, CreateUserRequest, User};
use hapa_transport::peer::MESH_TOKEN;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::incident_tracker::TestChannel;
use crate::test_mesh::{TOKEN, TestMesh};
use crate::tools::within;

/// The password of every user.
pub const PASSWORD: &str = "correct horse battery staple";

/// The identity of a client.
#[derive(Clone, Copy, Debug)]
pub enum Identity<'a> {
    /// No credential.
    Anonymous,
    /// A service of the mesh, or an operator with its token.
    Mesh,
    /// The holder of a key.
    Key(&'a str),
    /// The holder of an access token.
    Session(&'a str),
}

/// One metadata entry on every call.
#[derive(Clone, Debug)]
pub(crate) struct Header(Option<(&'static str, MetadataValue<Ascii>)>);

impl Interceptor for Header {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some((name, value)) = &self.0 {
            request.metadata_mut().insert(*name, value.clone());
        }
        Ok(request)
    }
}

impl Identity<'_> {
    /// A client's channel with this identity.
    pub fn on(self, channel: Channel) -> TestChannel {
        let entry = match self {
            Identity::Anonymous => None,
            Identity::Mesh => Some((MESH_TOKEN, TOKEN.to_owned())),
            Identity::Key(text) => Some(("x-api-key", text.to_owned())),
            Identity::Session(token) => Some(("authorization", format!("Bearer {token}"))),
        };
        let entry = entry.map(|(name, value)| (name, value.parse().expect("plain text")));
        TestChannel::new(InterceptedService::new(channel, Header(entry)))
    }
}

/// A user with a session.
#[derive(Clone, Debug)]
pub struct LoggedInUser {
    /// The user.
    pub user: User,
    /// Its session.
    pub session_id: String,
    /// The access token.
    pub access_token: String,
    /// The refresh token.
    pub refresh_token: String,
}

impl TestMesh {
    /// Creates a user with these scopes (none: the default ones) and logs it in.
    pub async fn log_in_new_user(&self, email: &str, scopes: &[&str]) -> LoggedInUser {
        let request = CreateUserRequest {
            email: email.to_owned(),
            password: PASSWORD.to_owned(),
            scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
            ..CreateUserRequest::default()
        };
        let mut users = UserServiceClient::new(self.channel_as(Identity::Mesh));
        let made = within("a user", users.create_user(request)).await.expect("a user can be made");
        let user = made.into_inner().user.expect("a user");
        let reply = self.log_in(email, PASSWORD).await.expect("it can log in");
        LoggedInUser {
            user,
            session_id: reply.session.expect("a session").session_id,
            access_token: reply.access_token,
            refresh_token: reply.refresh_token,
        }
    }

    /// Logs in with a password.
    pub async fn log_in(
        &self,
        email: &str,
        password: &str,
    ) -> Result<CreateSessionResponse, Status> {
        let (email, password) = (email.to_owned(), password.to_owned());
        let proof = Some(Proof::Password(Password { email, password }));
        let mut sessions = SessionServiceClient::new(self.channel_as(Identity::Anonymous));
        let reply = sessions.create_session(CreateSessionRequest { proof, http_body: None });
        Ok(within("a session", reply).await?.into_inner())
    }
}

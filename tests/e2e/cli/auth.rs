//! Users, keys, sessions and the audit log as an operator and a user type them.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use hapa_test_harness::{TestMesh, hapa, within};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;

use crate::api::generate::question;

const EMAIL: &str = "mina@example.com";
const PASSWORD: &str = "correct horse battery";

/// A mesh, and a folder with the session of a user.
struct Shell {
    mesh: TestMesh,
    home: TempDir,
}

/// What a command did.
struct Done {
    ok: bool,
    out: String,
    notes: String,
}

impl Done {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }

    fn lines(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[track_caller]
    fn fine(self) -> Done {
        assert!(self.ok, "{}{}", self.out, self.notes);
        self
    }

    #[track_caller]
    fn refused(self, word: &str) -> Done {
        assert!(!self.ok && self.notes.contains(word), "{}{}", self.out, self.notes);
        self
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Done {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let (out, notes) = (text(output.stdout), text(output.stderr));
        Done { ok: output.status.success(), out, notes }
    }
}

impl Shell {
    async fn start() -> Shell {
        Shell { mesh: TestMesh::start().await, home: tempfile::tempdir().unwrap() }
    }

    async fn run(&self, line: &str, input: &str, settings: &[(&str, &str)]) -> Done {
        let mut command = hapa();
        command.args(line.split(' ')).envs(settings.iter().copied());
        command.env("HAPA_ADDRESS", format!("http://{}", self.mesh.address));
        command.env("DATA_DIR", self.home.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A command that reads no input may have ended already.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes()).await;
        within(line, child.wait_with_output()).await.unwrap().into()
    }

    /// With the mesh token.
    async fn operator(&self, line: &str, input: &str) -> Done {
        self.run(line, input, &[("MESH_TOKEN", self.mesh.mesh_token())]).await
    }

    /// With the session that a login kept.
    async fn me(&self, line: &str) -> Done {
        self.run(&format!("{line} --as-me"), "", &[]).await
    }

    async fn create_user(&self, flags: &str) -> Value {
        let line = format!("user create --email {EMAIL} --password-stdin --json {flags}");
        self.operator(line.trim(), PASSWORD).await.fine().json()
    }

    async fn login(&self) -> Done {
        self.run(&format!("session login --email {EMAIL} --password-stdin"), PASSWORD, &[]).await
    }

    /// A new key's id and text.
    async fn create_key(&self, flags: &str) -> (String, String) {
        let line = format!(
            "key create --name ci --owner team --scope codegen:generate --unlimited --json {flags}"
        );
        let reply = self.operator(line.trim(), "").await.fine().json();
        let word = |value: &Value| value.as_str().unwrap().to_owned();
        (word(&reply["key"]["key_id"]), word(&reply["key_text"]))
    }

    fn session_file(&self) -> PathBuf {
        self.home.path().join("session")
    }

    async fn works(&self, key: &str) -> bool {
        self.mesh.client_with(key).generate_code(question("q")).await.is_ok()
    }
}

fn assert_private(file: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
}

/// Whether a row of the table begins with `name` and has `value`.
fn has(table: &str, name: &str, value: &str) -> bool {
    table.lines().any(|line| line.trim_start().starts_with(name) && line.contains(value))
}

#[tokio::test]
async fn an_operator_creates_the_first_admin_that_logs_in_and_manages() {
    let shell = Shell::start().await;
    let user = shell.create_user("--admin --name Mina").await;
    assert_eq!((user["email"].as_str(), user["has_password"].as_bool()), (Some(EMAIL), Some(true)));
    assert!(user["scopes"].as_array().unwrap().contains(&"auth:admin".into()));

    let done = shell.login().await.fine();
    assert!(done.out.contains("ses_") && done.out.contains(user["user_id"].as_str().unwrap()));
    assert_private(&shell.session_file());
    let me = shell.me("user show me --json").await.fine().json();
    assert_eq!(me["user_id"], user["user_id"]);
    let listed = shell.me("user list --json").await.fine().lines();
    assert_eq!(listed[0]["email"], EMAIL);
    let shown = shell.me(&format!("user show {EMAIL}")).await.fine().out;
    assert!(has(&shown, "NAME", "Mina") && has(&shown, "TOKEN BUDGET", "unlimited"), "{shown}");
    let made = shell.me("key create --name mine --scope codegen:generate --json").await.fine();
    assert_eq!(made.json()["key"]["owner"], user["user_id"]);
}

#[tokio::test]
async fn a_password_is_no_argument_and_a_pipe_has_to_say_that_it_holds_one() {
    let shell = Shell::start().await;
    let create = format!("user create --email {EMAIL}");
    let done = shell.operator(&create, PASSWORD).await.refused("--password-stdin");
    assert!(done.out.is_empty() && !done.notes.contains(PASSWORD));
    shell.operator(&format!("{create} --password-stdin"), "").await.refused("no new password");
    shell.operator(&format!("{create} --password-stdin"), "short").await.refused("E4001");
    let login = format!("session login --email {EMAIL}");
    shell.run(&login, PASSWORD, &[]).await.refused("--password-stdin");
    let user = shell.operator(&format!("{create} --no-password --json"), "").await.fine().json();
    assert_eq!(user["has_password"], false);
    shell.login().await.refused("E4003");
    assert!(!shell.session_file().exists());
}

#[tokio::test]
async fn a_session_is_renewed_once_by_commands_that_start_together_and_ended_by_a_logout() {
    let shell = Shell::start().await;
    shell.create_user("").await;
    shell.run("session token", "", &[]).await.refused("session login");
    shell.login().await.fine();
    let first = shell.run("session token", "", &[]).await.fine().out;
    assert_eq!(shell.run("session token", "", &[]).await.fine().out, first, "it lives on");

    let read = || -> Value {
        serde_json::from_slice(&std::fs::read(shell.session_file()).unwrap()).unwrap()
    };
    let mut kept = read();
    kept["expire_time"] = "2020-01-01T00:00:00Z".into();
    std::fs::write(shell.session_file(), kept.to_string()).unwrap();
    let (one, other) =
        tokio::join!(shell.run("session token", "", &[]), shell.run("session token", "", &[]));
    let (one, other) = (one.fine().out, other.fine().out);
    assert_eq!(one, other);
    assert_ne!(read()["refresh_token"], kept["refresh_token"]);
    assert_private(&shell.session_file());
    // An access token is accepted in place of an API key.
    let sessions =
        shell.run("session list --json", "", &[("HAPA_API_KEY", one.trim())]).await.fine().lines();
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions[0]["session_id"], kept["session_id"]);

    let done = shell.run("session logout", "", &[]).await.fine();
    assert!(done.out.contains("has ended") && !shell.session_file().exists(), "{}", done.out);
    shell.run("session logout", "", &[]).await.fine();
    shell.me("session list").await.refused("session login");
}

#[tokio::test]
async fn sessions_are_ended_one_by_one_or_all_of_a_user() {
    let shell = Shell::start().await;
    shell.create_user("").await;
    let login = format!("session login --email {EMAIL} --password-stdin --json");
    let first = shell.run(&login, PASSWORD, &[]).await.fine().json();
    assert!(first["session_id"].as_str().unwrap().starts_with("ses_"));
    let again = shell.run(&login, PASSWORD, &[]).await.fine();
    assert!(again.notes.contains(first["session_id"].as_str().unwrap()), "{}", again.notes);

    shell.operator("session list", "").await.refused("--as-me");
    let list = format!("session list --json --user {EMAIL}");
    assert_eq!(shell.operator(&list, "").await.fine().lines().len(), 2);
    let revoke = format!("session revoke {}", first["session_id"].as_str().unwrap());
    let done = shell.me(&revoke).await.fine();
    assert_eq!(done.out, "sessions ended: 1\n");
    let all = format!("session revoke --all --json --user {EMAIL}");
    assert_eq!(shell.operator(&all, "").await.fine().json()["revoked_sessions"], 1);
    assert!(shell.operator(&list, "").await.fine().lines().is_empty());
    let done = shell.run("session logout", "", &[]).await.fine();
    assert!(done.out.contains("had ended already"), "{}", done.out);
}

#[tokio::test]
async fn a_rotated_key_has_a_new_text_once_and_the_old_one_works_on() {
    let shell = Shell::start().await;
    let (key_id, old) = shell.create_key("").await;
    let done = shell.operator(&format!("key rotate {key_id} --overlap 1h"), "").await.fine();
    let new = done.out.trim();
    assert!(new.starts_with("hapa_") && new != old && done.notes.contains("works until"));
    assert!(!done.notes.contains(new), "a text goes to standard output alone");
    assert!(shell.works(&old).await && shell.works(new).await);

    let shown = shell.operator(&format!("key show {key_id}"), "").await.fine().out;
    assert!(has(&shown, "newest", "with the key") && has(&shown, "previous", ":"), "{shown}");
    let json = shell.operator(&format!("key show {key_id} --json"), "").await.fine();
    assert_eq!(json.json()["texts"].as_array().unwrap().len(), 2);
    assert!(!json.out.contains(new) && !json.out.contains(&old));

    let out = shell.home.path().join("new-key");
    let line = format!("key rotate {key_id} --overlap 0 --json --out {}", out.display());
    let done = shell.operator(&line, "").await.fine();
    assert_eq!(done.json()["key_text"], "");
    assert_private(&out);
    assert!(shell.works(std::fs::read_to_string(&out).unwrap().trim()).await);
    within("the end of the old texts", async {
        while shell.works(&old).await || shell.works(new).await {}
    })
    .await;
    shell.operator(&format!("key rotate {key_id} --overlap soon"), "").await.refused("90s");
    shell.mesh.finish().await;
}

#[tokio::test]
async fn an_update_narrows_a_key_and_leaves_the_rest() {
    let shell = Shell::start().await;
    let (key_id, text) =
        shell.create_key("--tokens-per-day 500000 --tokens-per-month 5000000").await;
    let update = format!("key update {key_id} --json");
    let key = shell.operator(&format!("{update} --tokens-per-day 700000"), "").await.fine().json();
    assert_eq!(key["token_budget"]["per_day"], "700000");
    assert_eq!(key["token_budget"]["per_month"], "5000000", "the half that was not given");
    assert_eq!(key["name"], "ci");
    let line = format!("{update} --scope errors:read --expires never --model sim-coder");
    let key = shell.operator(&line, "").await.fine().json();
    assert_eq!(key["scopes"], serde_json::json!(["errors:read"]));
    assert_eq!(key["allowed_models"], serde_json::json!(["sim-coder"]));
    assert!(key["expire_time"].is_null() && key["token_budget"]["per_day"] == "700000");
    within("the scope to be gone", async { while shell.works(&text).await {} }).await;
    shell.operator(&format!("key update {key_id}"), "").await.refused("--tokens-per-day");
    shell.operator("key update key_nobody --name x", "").await.refused("E4010");
    shell.mesh.finish().await;
}

#[tokio::test]
async fn keys_are_listed_by_state_and_scope() {
    let shell = Shell::start().await;
    let (ended, _) = shell.create_key("").await;
    let (alive, _) = shell.create_key("").await;
    shell.operator(&format!("key revoke {ended}"), "").await.fine();
    let ids = async |flags: &str| {
        let line = format!("key list --json --owner team {flags}");
        let keys = shell.operator(line.trim(), "").await.fine().lines();
        keys.iter().map(|key| key["key_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids("").await, [alive.clone(), ended.clone()]);
    assert_eq!(ids("--state active").await, [alive]);
    assert_eq!(ids("--state revoked --scope codegen:generate").await, [ended]);
    assert!(ids("--state expired").await.is_empty() && ids("--scope cache:admin").await.is_empty());
    shell.operator("key list --state asleep", "").await.refused("revoked");
    let table = shell.operator("key list", "").await.fine().out;
    assert!(table.lines().next().unwrap().contains("LAST USED"));
}

#[tokio::test]
async fn usage_shows_what_was_used_and_what_is_left() {
    let shell = Shell::start().await;
    let (key_id, text) = shell.create_key("--tokens-per-day 1000000").await;
    assert!(shell.works(&text).await);
    let used = within("the settlement", async {
        loop {
            let line = format!("key usage {key_id} --json");
            let key = shell.operator(&line, "").await.fine().json();
            let tokens = key["token_usage"]["day_tokens"].as_str().map(str::to_owned);
            if let Some(tokens) = tokens.filter(|tokens| tokens != "0") {
                return tokens.parse::<u64>().unwrap();
            }
        }
    })
    .await;
    let table = shell.operator(&format!("key usage {key_id}"), "").await.fine().out;
    assert!(has(&table, &key_id, &(1_000_000 - used).to_string()), "{table}");
    assert!(has(&table, &key_id, "unlimited"), "no budget for the month: {table}");
    let all = shell.operator("key usage", "").await.fine().out;
    assert!(has(&all, &key_id, &used.to_string()), "{all}");
    let listed = shell.operator("key usage --json", "").await.fine().lines();
    assert!(listed.len() >= 2 && listed.iter().any(|key| key["key_id"] == *key_id));
}

#[tokio::test]
async fn users_are_changed_and_removed_by_their_address() {
    let shell = Shell::start().await;
    shell.create_user("--tokens-per-day 1000").await;
    let update = format!("user update {EMAIL} --json --name Min --tokens-per-month 20000");
    let user = shell.operator(&update, "").await.fine().json();
    assert_eq!((user["name"].as_str(), user["email"].as_str()), (Some("Min"), Some(EMAIL)));
    assert_eq!(user["token_budget"]["per_day"], "1000", "the half that was not given");
    assert_eq!(user["token_budget"]["per_month"], "20000");
    shell.operator("user show nobody@example.com", "").await.refused("nobody@example.com");
    shell.operator("user show me", "").await.refused("--as-me");

    let delete = format!("user delete {EMAIL}");
    shell.operator(&delete, "y\n").await.refused("--yes");
    let done = shell.operator(&format!("{delete} --yes"), "").await.fine();
    assert!(done.out.contains(EMAIL));
    assert!(shell.operator("user list --json", "").await.fine().lines().is_empty());
}

#[tokio::test]
async fn a_password_is_set_by_an_admin_or_with_the_old_one() {
    let shell = Shell::start().await;
    shell.create_user("").await;
    shell.login().await.fine();
    let wrong = "not the password at all\na new long password\n";
    let passwd = "user passwd me --password-stdin --as-me";
    shell.run(passwd, wrong, &[]).await.refused("E4003");
    let right = format!("{PASSWORD}\na new long password\n");
    shell.run(passwd, &right, &[]).await.fine();
    shell.login().await.refused("E4003");
    let line = format!("user passwd {EMAIL} --password-stdin");
    shell.operator(&line, PASSWORD).await.fine();
    shell.login().await.fine();
}

#[tokio::test]
async fn a_profile_is_set_in_parts_and_cleared() {
    let shell = Shell::start().await;
    shell.create_user("").await;
    shell.login().await.fine();
    let set = "user profile set me --json";
    let line = format!("{set} --skill-level expert --feature type_hints --feature f_strings");
    shell.me(&line).await.fine();
    let profile = shell.me(&format!("{set} --explanation brief")).await.fine().json();
    assert_eq!(profile["python_skill_level"], "expert", "what was not given stays");
    assert_eq!(profile["explanation_style"], "brief");
    assert_eq!(profile["preferred_language_features"][1], "f_strings");
    let shown = shell.operator(&format!("user profile show {EMAIL}"), "").await.fine().out;
    assert!(has(&shown, "SKILL LEVEL", "expert") && has(&shown, "CONTEXT", "default"), "{shown}");
    shell.me(&format!("{set} --skill-level wizard")).await.refused("E4001");
    let profile = shell.me(&format!("{set} --clear --structure minimal")).await.fine().json();
    assert_eq!(profile["python_skill_level"], "");
    assert_eq!(profile["code_output_structure"], "minimal");
}

#[tokio::test]
async fn the_audit_log_is_listed_and_checked() {
    let shell = Shell::start().await;
    let (key_id, text) = shell.create_key("").await;
    shell.operator(&format!("key revoke {key_id}"), "").await.fine();
    let list = format!("audit list --json --subject key:{key_id}");
    let entries = shell.operator(&list, "").await.fine();
    assert!(!entries.out.contains(&text));
    let entries = entries.lines();
    let actions: Vec<_> = entries.iter().map(|entry| entry["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["key.revoke", "key.create"], "newest first");
    assert_eq!(entries[0]["actor"], "mesh");
    let count = async |flags: &str| {
        shell.operator(&format!("audit list --json {flags}"), "").await.fine().lines().len()
    };
    assert_eq!(count(&format!("--subject key:{key_id} --action key.revoke --since 1h")).await, 1);
    assert_eq!(count(&format!("--subject key:{key_id} --until 1h")).await, 0);
    assert_eq!(count("--actor mesh --action user").await, 0);
    let one = shell.operator("audit list --limit 1", "").await.fine();
    assert!(one.out.lines().count() == 2 && one.notes.contains("--limit 0"), "{}", one.notes);
    shell.operator("audit list --since yesterday", "").await.refused("--since");

    let found = shell.operator("audit verify --json", "").await.fine().json();
    assert_eq!(found["intact"], true);
    let head = found["head_hash"].as_str().unwrap();
    assert_eq!(head.len(), 64);
    let said = shell.operator("audit verify", "").await.fine().out;
    assert!(said.contains(head) && said.contains(found["entries"].as_str().unwrap()), "{said}");
}

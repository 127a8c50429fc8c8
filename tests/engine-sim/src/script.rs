//! Scripts: the answers of the engine, with their pace and faults.
//!
//! Invariants: a script is plain data and cheap to clone. Its tokens are encoded as JSON once, so that
//! a paced stream only copies bytes. The joined texts of the tokens are the text, byte for byte.

use std::sync::Arc;
use std::time::Duration;

/// The usual answer of a code model: an explanation, a fenced block, and more explanation.
const DEFAULT_ANSWER: &str = "Here is a function that greets by name.\n\n\
    ```python\ndef greet(name: str) -> str:\n    \"\"\"Return a greeting.\"\"\"\n    return f\"Hello, {name}!\"\n```\n\n\
    It returns the text instead of printing it. \
    이 함수는 이름을 받아 인사말을 돌려줍니다. 출력은 호출하는 쪽에서 합니다.\n";

/// The default log probability of a token.
const DEFAULT_LOGPROB: f64 = -0.25;

/// Maximum length of a token of [`Script::text`], in characters.
const MAX_TOKEN_CHARS: usize = 6;

/// One answer of the engine: its tokens, their pace and framing, and a [`Fault`].
///
/// The default is a short demonstration with a fenced code block and some Korean, sent at once.
#[derive(Clone, Debug)]
pub struct Script {
    pub(super) tokens: Arc<[Token]>,
    /// The tokens of the second and later choices of a completion.
    pub(super) others: Vec<Arc<[Token]>>,
    pub(super) logprobs: bool,
    /// Number of tokens that are reasoning.
    pub(super) reasoning: usize,
    pub(super) first_after: Duration,
    pub(super) gap: Duration,
    pub(super) batch: usize,
    pub(super) finish: Option<&'static str>,
    pub(super) done: bool,
    pub(super) usage: UsageReport,
    pub(super) line_end: LineEnd,
    pub(super) comments: bool,
    pub(super) pieces: Option<usize>,
    pub(super) piece_gap: Duration,
    pub(super) holds: Vec<usize>,
    pub(super) fault: Option<Fault>,
}

/// A failure. `…After(n)` happens when `n` tokens were sent. An `n` beyond the answer means
/// after its last token and before the chunk with the finish reason.
///
/// For a whole answer (`stream: false`), `StallAfter` is silence before the headers, and `ErrorAfter` is a 500.
/// The faults that end or spoil a stream close the connection in the middle of the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This status instead of an answer, with an error body in vLLM's shape.
    Status {
        /// The HTTP status.
        code: u16,
        /// Seconds for a `Retry-After` header.
        retry_after: Option<u32>,
    },
    /// This status and body instead of an answer. The body is JSON if it begins with `{` or `[`.
    Reply {
        /// The HTTP status.
        code: u16,
        /// The body.
        body: String,
    },
    /// The connection closes without a single byte.
    CutBeforeHeaders,
    /// Silence before the headers.
    HangBeforeHeaders,
    /// Silence between the headers and the first byte of the body.
    HangAfterHeaders,
    /// Silence, with the connection open.
    StallAfter(usize),
    /// The connection closes in the middle of the body.
    CutAfter(usize),
    /// The body ends correctly, but without finish reason and `[DONE]`.
    EndAfter(usize),
    /// An error event inside the 200, followed by `[DONE]`.
    ErrorAfter(usize),
    /// An event with this JSON, followed by `[DONE]`.
    EventAfter(usize, serde_json::Value),
    /// A `data:` line that continues until the client disconnects (64 MiB at most).
    EndlessLineAfter(usize),
}

impl Fault {
    /// This status without a `Retry-After`.
    pub fn status(code: u16) -> Self {
        Self::Status { code, retry_after: None }
    }

    /// This status with a body.
    pub fn reply(code: u16, body: &impl ToString) -> Self {
        Self::Reply { code, body: body.to_string() }
    }

    /// 429 with a `Retry-After`. vLLM never sends it; a proxy in front of it may.
    pub fn too_many_requests(retry_after: u32) -> Self {
        Self::Status { code: 429, retry_after: Some(retry_after) }
    }
}

/// The line ends on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LineEnd {
    /// `\n`, as vLLM does.
    #[default]
    Lf,
    /// `\r\n`, which the event-stream format allows as well.
    CrLf,
}

/// The contents of the usage chunk.
#[derive(Clone, Copy, Debug)]
pub(super) enum UsageReport {
    Counted,
    Fixed { prompt: u64, completion: u64 },
    Omitted,
}

#[derive(Debug)]
pub(super) struct Token {
    pub(super) text: String,
    pub(super) json: String,
    pub(super) logprob: f64,
}

impl Script {
    /// Streams this text, split into word-like tokens.
    pub fn text(text: &str) -> Self {
        Self::tokens(split(text))
    }

    /// Streams exactly these tokens, one chunk each.
    pub fn tokens<T: Into<String>>(tokens: impl IntoIterator<Item = T>) -> Self {
        let token = |text: T| {
            let text = text.into();
            let json = serde_json::Value::from(text.as_str()).to_string();
            Token { json, text, logprob: DEFAULT_LOGPROB }
        };
        Self {
            tokens: tokens.into_iter().map(token).collect(),
            others: Vec::new(),
            logprobs: true,
            reasoning: 0,
            first_after: Duration::ZERO,
            gap: Duration::ZERO,
            batch: 1,
            finish: Some("stop"),
            done: true,
            usage: UsageReport::Counted,
            line_end: LineEnd::Lf,
            comments: false,
            pieces: None,
            piece_gap: Duration::ZERO,
            holds: Vec::new(),
            fault: None,
        }
    }

    /// Answers a completion with these choices, a token of each in turn. All other settings are those of the
    /// first one. If the request has more choices, they repeat.
    ///
    /// # Panics
    ///
    /// If there is no choice.
    pub fn choices(choices: impl IntoIterator<Item = Script>) -> Self {
        let mut choices = choices.into_iter();
        let first = choices.next().expect("a choice");
        Self { others: choices.map(|choice| choice.tokens).collect(), ..first }
    }

    /// Reports this log probability for each token.
    #[must_use]
    pub fn logprob(self, logprob: f64) -> Self {
        let tokens = self.tokens.iter();
        let tokens = tokens.map(|Token { text, json, .. }| Token {
            text: text.clone(),
            json: json.clone(),
            logprob,
        });
        Self { tokens: tokens.collect(), ..self }
    }

    /// Reports no log probabilities.
    #[must_use]
    pub fn without_logprobs(self) -> Self {
        Self { logprobs: false, ..self }
    }

    /// Sends the first tokens of a chat as reasoning, as vLLM does with a reasoning parser.
    #[must_use]
    pub fn reasoning(self, tokens: usize) -> Self {
        Self { reasoning: tokens, ..self }
    }

    /// Waits this long between the headers and the first chunk.
    #[must_use]
    pub fn first_after(self, first_after: Duration) -> Self {
        Self { first_after, ..self }
    }

    /// Waits this long between two tokens (default: no wait). A stream that was delayed by a slow client
    /// catches up.
    #[must_use]
    pub fn gap(self, gap: Duration) -> Self {
        Self { gap, ..self }
    }

    /// Puts this many events into one write (default 1; `usize::MAX` for the whole answer).
    #[must_use]
    pub fn batch(self, events: usize) -> Self {
        Self { batch: events.max(1), ..self }
    }

    /// Ends with this finish reason (default `stop`).
    #[must_use]
    pub fn finish(self, reason: &'static str) -> Self {
        Self { finish: Some(reason), ..self }
    }

    /// Sends no chunk with a finish reason; usage and `[DONE]` follow as usual.
    #[must_use]
    pub fn without_finish(self) -> Self {
        Self { finish: None, ..self }
    }

    /// Ends after the finish reason (and usage) without `[DONE]`.
    #[must_use]
    pub fn without_done(self) -> Self {
        Self { done: false, ..self }
    }

    /// Reports this usage instead of the counted one.
    #[must_use]
    pub fn usage(self, prompt: u64, completion: u64) -> Self {
        Self { usage: UsageReport::Fixed { prompt, completion }, ..self }
    }

    /// Reports no usage, even if asked to.
    #[must_use]
    pub fn without_usage(self) -> Self {
        Self { usage: UsageReport::Omitted, ..self }
    }

    /// Ends lines this way.
    #[must_use]
    pub fn line_end(self, line_end: LineEnd) -> Self {
        Self { line_end, ..self }
    }

    /// Sends a `: keep-alive` comment before every event.
    #[must_use]
    pub fn comments(self) -> Self {
        Self { comments: true, ..self }
    }

    /// Writes the body in pieces of this many bytes, which may split lines and characters. Each
    /// is a separate HTTP chunk, so that a client's library cannot join them.
    #[must_use]
    pub fn pieces(self, bytes: usize) -> Self {
        Self { pieces: Some(bytes.max(1)), ..self }
    }

    /// Waits this long after each piece.
    #[must_use]
    pub fn piece_gap(self, piece_gap: Duration) -> Self {
        Self { piece_gap, ..self }
    }

    /// Waits for one `Engine::release` when `tokens` tokens were sent. A test can step through a stream with
    /// several holds. A fault at the same place comes after the hold.
    #[must_use]
    pub fn hold(mut self, tokens: usize) -> Self {
        self.holds.push(tokens);
        self
    }

    /// Fails this way.
    #[must_use]
    pub fn fault(self, fault: Fault) -> Self {
        Self { fault: Some(fault), ..self }
    }

    /// The text of all tokens, for comparison with the client's text.
    pub fn full_text(&self) -> String {
        self.tokens.iter().map(|token| token.text.as_str()).collect()
    }

    /// The number of tokens.
    pub fn token_count(&self) -> usize {
        self.tokens.len()
    }
}

impl Default for Script {
    fn default() -> Self {
        Self::text(DEFAULT_ANSWER)
    }
}

impl From<Fault> for Script {
    fn from(fault: Fault) -> Self {
        Self::default().fault(fault)
    }
}

/// Splits before white space and after a few characters. Every byte is in exactly one token.
fn split(text: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut length = 0;
    let mut after_space = true;
    for c in text.chars() {
        let new_word = c.is_whitespace() && !after_space;
        if tokens.is_empty() || new_word || length == MAX_TOKEN_CHARS {
            tokens.push(String::new());
            length = 0;
        }
        if let Some(token) = tokens.last_mut() {
            token.push(c);
        }
        length += 1;
        after_space = c.is_whitespace();
    }
    tokens
}

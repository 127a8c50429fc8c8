//! Answers of the simulator: a stream of events, each in a write of its own as vLLM sends them, or one document.

use std::io;
use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::sim_text::{TOKEN_BYTES, answer, push_token};
use crate::spec::SimSettings;
use crate::upstream::counters::RequestGuard;

const EVENT_HEAD: &[u8] = br#"data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1,"model":"base","choices":["#;
const ROLE: &[u8] = br#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}"#;
const TOKEN_HEAD: &[u8] = br#"{"index":0,"delta":{"content":""#;
const TOKEN_TAIL: &[u8] =
    br#""},"logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":null}]}"#;
const LAST_TOKEN_TAIL: &[u8] =
    br#""},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]}"#;
const EVENT_END: &[u8] = b"\n\n";

type NextFrame = Poll<Option<Result<Frame<Bytes>, io::Error>>>;

/// A response body.
pub(crate) enum SimBody {
    Whole(Option<Bytes>, Option<RequestGuard>),
    Stream(Box<TokenStream>),
}

impl Body for SimBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> NextFrame {
        match self.get_mut() {
            SimBody::Whole(body, guard) => {
                if let Some(guard) = guard {
                    guard.is_finished = true;
                }
                Poll::Ready(body.take().map(|body| Ok(Frame::data(body))))
            }
            SimBody::Stream(stream) => stream.poll_event(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, SimBody::Whole(None, _))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            SimBody::Whole(body, _) => {
                let length = body.as_ref().map_or(0, Bytes::len);
                SizeHint::with_exact(u64::try_from(length).unwrap_or_default())
            }
            SimBody::Stream(_) => SizeHint::default(),
        }
    }
}

/// The next event of a stream.
#[derive(Clone, Copy)]
enum NextEvent {
    Role,
    Token(u64),
    Usage,
    Done,
    End,
}

/// A stream of tokens.
pub(crate) struct TokenStream {
    settings: SimSettings,
    guard: RequestGuard,
    epoch: u64,
    tokens: u64,
    /// The tokens of the prompt, if the client asked for the usage.
    usage: Option<u64>,
    next: NextEvent,
    begin: Instant,
    sleep: Pin<Box<Sleep>>,
    is_armed: bool,
    is_flushed: bool,
}

impl TokenStream {
    pub(crate) fn new(
        settings: SimSettings,
        guard: RequestGuard,
        tokens: u64,
        usage: Option<u64>,
    ) -> Self {
        let (epoch, begin) = (guard.counters.epoch.load(Relaxed), Instant::now());
        let sleep = Box::pin(sleep_until(begin));
        let (next, is_armed, is_flushed) = (NextEvent::Role, false, true);
        TokenStream {
            settings,
            guard,
            epoch,
            tokens,
            usage,
            next,
            begin,
            sleep,
            is_armed,
            is_flushed,
        }
    }

    /// Waits until a token is due. Where none has to wait, it returns once to hyper, which writes what it has.
    fn poll_due(&mut self, index: u64, context: &mut Context<'_>) -> Poll<()> {
        let SimSettings { first_token, interval, .. } = self.settings;
        if first_token.is_zero() && interval.is_zero() {
            if std::mem::replace(&mut self.is_flushed, true) {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        if !std::mem::replace(&mut self.is_armed, true) {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            self.sleep.as_mut().reset(self.begin + first_token + interval * index);
        }
        let due = self.sleep.as_mut().poll(context);
        self.is_armed = due.is_pending();
        due
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> NextFrame {
        let index = if let NextEvent::Token(index) = self.next { index } else { 0 };
        if matches!(self.next, NextEvent::Role | NextEvent::Token(_)) {
            if self.settings.is_silent {
                return Poll::Pending;
            }
            if self.guard.counters.epoch.load(Relaxed) != self.epoch {
                return Poll::Ready(Some(Err(io::Error::other("ended by the comparison"))));
            }
            if self.poll_due(index, context).is_pending() {
                return Poll::Pending;
            }
        }
        let event = match self.next {
            NextEvent::Role => {
                self.next = NextEvent::Token(0);
                [EVENT_HEAD, ROLE, EVENT_END].concat()
            }
            NextEvent::Token(index) => {
                let is_last = index + 1 >= self.tokens;
                let after = if self.usage.is_some() { NextEvent::Usage } else { NextEvent::Done };
                self.next = if is_last { after } else { NextEvent::Token(index + 1) };
                self.is_flushed = false;
                token_event(index, is_last)
            }
            NextEvent::Usage => {
                self.next = NextEvent::Done;
                let usage = usage(self.usage.unwrap_or_default(), self.tokens);
                [EVENT_HEAD, b"],", usage.as_bytes(), b"}", EVENT_END].concat()
            }
            NextEvent::Done => {
                self.next = NextEvent::End;
                b"data: [DONE]\n\n".to_vec()
            }
            NextEvent::End => {
                self.guard.is_finished = true;
                return Poll::Ready(None);
            }
        };
        Poll::Ready(Some(Ok(Frame::data(event.into()))))
    }
}

fn token_event(index: u64, is_last: bool) -> Vec<u8> {
    let tail = if is_last { LAST_TOKEN_TAIL } else { TOKEN_TAIL };
    let length = EVENT_HEAD.len() + TOKEN_HEAD.len() + TOKEN_BYTES + tail.len() + EVENT_END.len();
    let mut event = Vec::with_capacity(length);
    event.extend_from_slice(EVENT_HEAD);
    event.extend_from_slice(TOKEN_HEAD);
    push_token(&mut event, index);
    event.extend_from_slice(tail);
    event.extend_from_slice(EVENT_END);
    event
}

fn usage(prompt: u64, completion: u64) -> String {
    let total = prompt + completion;
    format!(
        r#""usage":{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":{completion}}}"#
    )
}

/// The answer to a call that is not streamed.
pub(crate) fn whole(tokens: u64, prompt: u64) -> Vec<u8> {
    let usage = usage(prompt, tokens);
    [
        br#"{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion","created":1,"model":"base","choices":[{"index":0,"message":{"role":"assistant","content":""#,
        &answer(tokens)[..],
        br#"","refusal":null,"annotations":null,"audio":null,"function_call":null,"tool_calls":[],"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}],"#,
        usage.as_bytes(),
        br#","prompt_logprobs":null,"kv_transfer_params":null}"#,
    ]
    .concat()
}

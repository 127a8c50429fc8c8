//! The answer to a completion: several choices, a token of each in turn.
//!
//! Invariants: a choice ends before a stop string, as in vLLM. Holds and faults count the tokens of all
//! choices together.

use std::io;
use std::sync::Arc;

use tokio::io::AsyncWriteExt as _;

use super::super::http::{Response, stream_head};
use super::super::ledger::Outcome;
use super::super::request::{Api, GenerationRequest};
use super::super::script::{Fault, Script, Token, UsageReport};
use super::super::shapes::{self, ChoicePiece, ChunkWriter, Usage};
use super::{BodyState, Player, fault_at, pace, sleep_unless_zero};

/// The tokens of one choice.
struct Choice {
    tokens: Vec<(String, f64)>,
    finish: Option<&'static str>,
}

impl Choice {
    fn new(
        tokens: &Arc<[Token]>,
        script: &Script,
        request: &GenerationRequest,
        stop: &[String],
    ) -> Self {
        let most = request.max_tokens.unwrap_or(usize::MAX);
        let cut = most < tokens.len();
        let tokens = tokens.iter().take(most);
        let mut choice = Self {
            tokens: tokens.map(|token| (token.text.clone(), token.logprob)).collect(),
            finish: if cut { script.finish.and(Some("length")) } else { script.finish },
        };
        let text = choice.text();
        if let Some(end) = stop.iter().filter_map(|stop| text.find(stop.as_str())).min() {
            choice.finish = script.finish.and(Some("stop"));
            choice.cut(end);
        }
        choice
    }

    fn text(&self) -> String {
        self.tokens.iter().map(|(text, _)| text.as_str()).collect()
    }

    /// The token with the stop string counts as generated, but its text is truncated.
    fn cut(&mut self, end: usize) {
        let mut left = end;
        let mut kept = 0;
        for (text, _) in &mut self.tokens {
            kept += 1;
            if text.len() > left {
                text.truncate(left);
                break;
            }
            left -= text.len();
        }
        self.tokens.truncate(kept);
    }
}

impl<'a> Player<'a, '_, '_> {
    pub(super) async fn complete(&mut self, request: &GenerationRequest) -> io::Result<Outcome> {
        let Api::Completion { choices, logprobs, stop } = &request.api else { unreachable!() };
        let logprobs = *logprobs && self.script.logprobs;
        let script = self.script;
        let said: Vec<_> = std::iter::once(&script.tokens).chain(&script.others).collect();
        let choices: Vec<_> = (0..*choices)
            .map(|index| Choice::new(said[index % said.len()], script, request, stop))
            .collect();
        if !request.stream {
            return self.complete_whole(request, &choices).await;
        }
        self.out.write_all(&stream_head()).await?;
        if script.fault == Some(Fault::HangAfterHeaders) {
            return std::future::pending().await;
        }
        sleep_unless_zero(script.first_after).await;
        let chunks = ChunkWriter::new(request);
        if let Some(fault) = self.speak(&chunks, &choices, logprobs).await? {
            return self.fail(fault).await;
        }
        if request.include_usage
            && let Some(usage) = usage(script, request, &choices)
        {
            self.event(|body| chunks.usage(usage, body)).await?;
        }
        if script.done {
            self.done();
        }
        self.flush(BodyState::Ends).await?;
        Ok(Outcome::Finished(script.finish))
    }

    /// Says all tokens, or as many as come before a fault.
    async fn speak(
        &mut self,
        chunks: &ChunkWriter,
        choices: &[Choice],
        logprobs: bool,
    ) -> io::Result<Option<&'a Fault>> {
        let script = self.script;
        let length = choices.iter().map(|choice| choice.tokens.len()).sum();
        let (mut sent, mut pace) = (0, pace(script.gap));
        for (index, at) in turns(choices) {
            let choice = &choices[index];
            let Some((text, logprob)) = choice.tokens.get(at) else {
                let piece = ChoicePiece { index, text: "", logprob: None, finish: choice.finish };
                self.event(|body| chunks.choice(&piece, at as u64, body)).await?;
                continue;
            };
            self.wait_at_holds(sent, length, &mut pace).await?;
            if let Some(fault) = fault_at(script, sent, length) {
                return Ok(Some(fault));
            }
            if let Some(pace) = pace.as_mut().filter(|_| sent > 0) {
                pace.tick().await;
            }
            sent += 1;
            self.tokens += 1;
            let logprob = Some(*logprob).filter(|_| logprobs);
            let piece = ChoicePiece { index, text, logprob, finish: None };
            self.event(|body| chunks.choice(&piece, at as u64 + 1, body)).await?;
        }
        self.wait_at_holds(sent, length, &mut pace).await?;
        Ok(fault_at(script, sent, length))
    }

    async fn complete_whole(
        &mut self,
        request: &GenerationRequest,
        choices: &[Choice],
    ) -> io::Result<Outcome> {
        let texts = choices.iter().map(|choice| (choice.text(), choice.finish));
        let body = shapes::text_completion(request, texts, usage(self.script, request, choices));
        self.generation.send(choices.iter().map(|choice| choice.tokens.len() as u64).sum());
        self.out.write_all(&Response::json(200, &body).bytes()).await?;
        Ok(Outcome::Finished(self.script.finish))
    }
}

/// A token of each choice in turn: which choice, and which of its tokens. One past the last is the
/// chunk with its finish reason, where it has one.
fn turns(choices: &[Choice]) -> Vec<(usize, usize)> {
    let longest = choices.iter().map(|choice| choice.tokens.len()).max().unwrap_or(0);
    let speaks = |(index, at): &(usize, usize)| {
        let choice = &choices[*index];
        *at < choice.tokens.len() || *at == choice.tokens.len() && choice.finish.is_some()
    };
    let turns = (0..=longest).flat_map(|at| (0..choices.len()).map(move |index| (index, at)));
    turns.filter(speaks).collect()
}

fn usage(script: &Script, request: &GenerationRequest, choices: &[Choice]) -> Option<Usage> {
    let completion = choices.iter().map(|choice| choice.tokens.len() as u64).sum();
    match script.usage {
        UsageReport::Counted => Some(Usage { prompt: request.prompt_tokens, completion }),
        UsageReport::Fixed { prompt, completion } => Some(Usage { prompt, completion }),
        UsageReport::Omitted => None,
    }
}

//! A completion's answer: several choices, a token of each in turn.
//!
//! Kept true: a choice ends where a stop string begins, as in vLLM, and holds and faults count the
//! tokens of all choices together.

use std::io;
use std::sync::Arc;

use tokio::io::AsyncWriteExt as _;

use super::super::http::{Response, stream_head};
use super::super::ledger::End;
use super::super::request::{Api, Ask};
use super::super::script::{Fault, Report, Script, Token};
use super::super::shapes::{self, Chunks, Piece, Usage};
use super::{More, Player, fault_at, pace, rest};

/// What one choice will say.
struct Choice {
    tokens: Vec<(String, f64)>,
    finish: Option<&'static str>,
}

impl Choice {
    fn new(tokens: &Arc<[Token]>, script: &Script, ask: &Ask, stop: &[String]) -> Self {
        let most = ask.max_tokens.unwrap_or(usize::MAX);
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

    /// The token that has the stop was made, but not all of its text is shown.
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
    pub(super) async fn complete(&mut self, ask: &Ask) -> io::Result<End> {
        let Api::Completion { choices, logprobs, stop } = &ask.api else { unreachable!() };
        let logprobs = *logprobs && self.script.logprobs;
        let script = self.script;
        let said: Vec<_> = std::iter::once(&script.tokens).chain(&script.others).collect();
        let choices: Vec<_> = (0..*choices)
            .map(|index| Choice::new(said[index % said.len()], script, ask, stop))
            .collect();
        if !ask.stream {
            return self.complete_whole(ask, &choices).await;
        }
        self.out.write_all(&stream_head()).await?;
        if script.fault == Some(Fault::HangAfterHeaders) {
            return std::future::pending().await;
        }
        rest(script.first_after).await;
        let chunks = Chunks::new(ask);
        if let Some(fault) = self.speak(&chunks, &choices, logprobs).await? {
            return self.fail(fault).await;
        }
        if ask.include_usage
            && let Some(usage) = usage(script, ask, &choices)
        {
            self.event(|body| chunks.usage(usage, body)).await?;
        }
        if script.done {
            self.done();
        }
        self.flush(More::Ends).await?;
        Ok(End::Finished(script.finish))
    }

    /// Says all tokens, or as many as come before a fault.
    async fn speak(
        &mut self,
        chunks: &Chunks,
        choices: &[Choice],
        logprobs: bool,
    ) -> io::Result<Option<&'a Fault>> {
        let script = self.script;
        let length = choices.iter().map(|choice| choice.tokens.len()).sum();
        let (mut sent, mut pace) = (0, pace(script.gap));
        for (index, at) in turns(choices) {
            let choice = &choices[index];
            let Some((text, logprob)) = choice.tokens.get(at) else {
                let piece = Piece { index, text: "", logprob: None, finish: choice.finish };
                self.event(|body| chunks.choice(&piece, at as u64, body)).await?;
                continue;
            };
            self.pass_holds(sent, length, &mut pace).await?;
            if let Some(fault) = fault_at(script, sent, length) {
                return Ok(Some(fault));
            }
            if let Some(pace) = pace.as_mut().filter(|_| sent > 0) {
                pace.tick().await;
            }
            sent += 1;
            self.tokens += 1;
            let logprob = Some(*logprob).filter(|_| logprobs);
            let piece = Piece { index, text, logprob, finish: None };
            self.event(|body| chunks.choice(&piece, at as u64 + 1, body)).await?;
        }
        self.pass_holds(sent, length, &mut pace).await?;
        Ok(fault_at(script, sent, length))
    }

    async fn complete_whole(&mut self, ask: &Ask, choices: &[Choice]) -> io::Result<End> {
        let texts = choices.iter().map(|choice| (choice.text(), choice.finish));
        let body = shapes::text_completion(ask, texts, usage(self.script, ask, choices));
        self.flight.send(choices.iter().map(|choice| choice.tokens.len() as u64).sum());
        self.out.write_all(&Response::json(200, &body).bytes()).await?;
        Ok(End::Finished(self.script.finish))
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

fn usage(script: &Script, ask: &Ask, choices: &[Choice]) -> Option<Usage> {
    let completion = choices.iter().map(|choice| choice.tokens.len() as u64).sum();
    match script.usage {
        Report::Counted => Some(Usage { prompt: ask.prompt_tokens, completion }),
        Report::Fixed { prompt, completion } => Some(Usage { prompt, completion }),
        Report::Omitted => None,
    }
}

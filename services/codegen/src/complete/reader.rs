//! What the engine's events say about the choices of a completion, read by read.

use hapa_proto::codegen::v1::Usage;

use crate::upstream::engine::{
    EngineError, EventAccumulator, FinishReason, JsonText, Logprobs, TextChunk, stream_error,
};

/// What one or more events said.
#[derive(Debug, Default)]
pub(crate) struct Said {
    pub(crate) pieces: Vec<Piece>,
    /// The model that answers, as the engine names it: foreign text.
    pub(crate) model: Option<String>,
    /// Of all choices together; comes last.
    pub(crate) usage: Option<Usage>,
    /// `[DONE]` came: no more will.
    pub(crate) done: bool,
}

/// What an event said about one choice.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub(crate) index: usize,
    pub(crate) text: String,
    /// The sum of the logarithms of its tokens' probabilities, and of how many tokens.
    pub(crate) logprob: f64,
    pub(crate) tokens: u32,
    pub(crate) finish_reason: Option<FinishReason>,
    /// Of this choice alone, until here.
    pub(crate) usage: Option<Usage>,
}

impl EventAccumulator for Said {
    fn has_begun(&self) -> bool {
        self.pieces.iter().any(|piece| !piece.text.is_empty())
    }

    fn push(&mut self, data: &[u8]) -> Result<(), EngineError> {
        if self.done || data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: TextChunk<'_> =
            serde_json::from_slice(data).map_err(|error| EngineError::from(&error))?;
        // Comes in a stream that began with 200, and is followed by [DONE].
        if let Some(error) = &chunk.error {
            return Err(stream_error(error));
        }
        if let (None, Some(JsonText(model))) = (&self.model, chunk.model) {
            self.model = Some(model.into_owned());
        }
        let usage = chunk.usage.map(Usage::from);
        if chunk.choices.is_empty() {
            self.usage = usage.or(self.usage);
        }
        for choice in chunk.choices {
            let mut piece = Piece { index: choice.index, usage, ..Piece::default() };
            if let Some(JsonText(text)) = choice.text {
                piece.text = text.into_owned();
            }
            for one in choice.logprobs.iter().flat_map(Logprobs::values) {
                piece.logprob += one;
                piece.tokens += 1;
            }
            piece.finish_reason = choice.finish_reason;
            self.pieces.push(piece);
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(events: &[&str]) -> Result<Said, EngineError> {
        let mut said = Said::default();
        events.iter().try_for_each(|event| said.push(event.as_bytes()))?;
        Ok(said)
    }

    #[test]
    fn choices_are_told_apart_and_the_last_usage_is_of_all() {
        let said = read(&[
            r#"{"model":"m","choices":[{"index":1,"text":"b","logprobs":{"token_logprobs":[-1.0,-2.0]}}],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}"#,
            r#"{"choices":[{"index":0,"text":"","finish_reason":"stop"}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}"#,
            "[DONE]",
        ])
        .unwrap();
        let [first, second] = &said.pieces[..] else { panic!("{said:?}") };
        assert_eq!((first.index, first.text.as_str(), first.tokens), (1, "b", 2));
        assert!((first.logprob + 3.0).abs() < 1e-9);
        assert_eq!(first.usage.unwrap().completion_tokens, 1);
        assert_eq!((second.index, second.finish_reason), (0, Some(FinishReason::Stop)));
        assert_eq!(said.usage.unwrap().completion_tokens, 2);
        assert_eq!(said.model.as_deref(), Some("m"));
        assert!(said.is_done());
    }

    #[test]
    fn an_error_inside_of_the_stream_is_one() {
        let error = read(&[r#"{"error":{"message":"engine died","code":500}}"#]).unwrap_err();
        assert_eq!(error.rejection().unwrap().0, 500);
        assert!(matches!(read(&["{"]).unwrap_err(), EngineError::InvalidReply(_)));
    }
}

//! Entry points for fuzzing (`make fuzz`) into the functions that process untrusted input first. Each
//! asserts invariants that hold for every input.

use std::time::Duration;

use hapa_proto::codegen::v1::{CompleteCodeRequest, GenerateCodeRequest, ValidateCodeRequest};
use prost::Message as _;

use crate::complete;
use crate::generate::control_token_filter::ControlTokenFilter;
use crate::generate::fence::FenceSplitter;
use crate::generate::think_tags::{Expect, OutputPart, ThinkTagSplitter};
use crate::request::generate_params::GenerateParams;
use crate::request::unicode::{InvisibleCharFilter, strip};
use crate::upstream::engine::EngineScheduling;
use crate::upstream::engine::sse::{EventTooLong, SseParser};
use crate::validate::{self, CodeInspector, Language};

/// Parses an engine's stream in pieces, with the length in the first byte; then processes its text.
pub fn stream(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first() else { return };
    let read = |piece: usize| {
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        let refused = rest.chunks(piece).find_map(|piece| {
            let event = |data: &[u8]| {
                events.push(data.to_vec());
                Ok::<_, EventTooLong>(())
            };
            parser.feed(piece, event).err()
        });
        (events, refused)
    };
    let whole = read(rest.len().max(1));
    assert_eq!(read(usize::from(*length).max(1)), whole, "the pieces make no difference");
    let (mut char_filter, mut splitter, mut inspector) =
        (InvisibleCharFilter::default(), FenceSplitter::default(), CodeInspector::new("python"));
    let (mut token_filter, mut tags) =
        (ControlTokenFilter::default(), ThinkTagSplitter::new(Expect::Detect));
    for event in &whole.0 {
        let text = String::from_utf8_lossy(event);
        tags.push(&char_filter.strip(&text), &mut |part, text| {
            if part == OutputPart::Answer {
                splitter.push(&token_filter.push(text), &mut |segment, text| {
                    inspector.push(segment.block, segment.info_word, text);
                });
            }
        });
    }
    assert!(inspector.warnings(false).len() <= 11);
}

/// Decodes and validates the requests of this service.
pub fn requests(bytes: &[u8]) {
    if let Ok(request) = GenerateCodeRequest::decode(bytes)
        && let Ok(params) = GenerateParams::validate(request, None)
    {
        assert_eq!(strip(&params.text), params.text.as_str());
        assert!(params.body("model", EngineScheduling::default()).is_ok());
    }
    if let Ok(request) = CompleteCodeRequest::decode(bytes) {
        complete::fuzz(request);
    }
    if let Ok(request) = ValidateCodeRequest::decode(bytes) {
        let _ = validate::validate_request(&request);
    }
}

/// Validates code in the language that the first byte selects.
pub fn code(bytes: &[u8]) {
    let Some((language, rest)) = bytes.split_first() else { return };
    let words = ["py", "js", "ts", "tsx", "java", "cpp", "cs"];
    let word = words[usize::from(*language) % words.len()];
    let (Some(language), Ok(code)) = (Language::from_name(word), std::str::from_utf8(rest)) else {
        return;
    };
    let lines = code.lines().count().max(1);
    if let Some(report) = validate::analyse(code, language, Duration::from_millis(200), true) {
        assert!(report.findings.iter().all(|finding| finding.line <= lines));
    }
}

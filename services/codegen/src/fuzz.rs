//! The ways in for fuzzing (`make fuzz`): what strangers write reaches these functions first. Each
//! asserts what must hold whatever is written.

use std::time::Duration;

use hapa_proto::codegen::v1::{CompleteCodeRequest, GenerateCodeRequest, ValidateCodeRequest};
use prost::Message as _;

use crate::completion;
use crate::engine::Scheduling;
use crate::engine::sse::{Reader, TooLong};
use crate::fence::FenceSplitter;
use crate::question::Question;
use crate::unicode::{InvisibleCharFilter, strip};
use crate::validate::{self, CodeInspector, Language};

/// An engine's stream in pieces, whose lengths the first byte sets; then its text as an answer.
pub fn stream(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first() else { return };
    let read = |piece: usize| {
        let (mut reader, mut events) = (Reader::default(), Vec::new());
        let refused = rest.chunks(piece).find_map(|piece| {
            let event = |data: &[u8]| {
                events.push(data.to_vec());
                Ok::<_, TooLong>(())
            };
            reader.feed(piece, event).err()
        });
        (events, refused)
    };
    let whole = read(rest.len().max(1));
    assert_eq!(read(usize::from(*length).max(1)), whole, "how it is cut makes no difference");
    let (mut char_filter, mut splitter, mut inspector) =
        (InvisibleCharFilter::default(), FenceSplitter::default(), CodeInspector::new("python"));
    for event in &whole.0 {
        let text = String::from_utf8_lossy(event);
        splitter.push(&char_filter.strip(&text), &mut |segment, text| {
            inspector.push(segment.block, segment.info_word, text);
        });
    }
    assert!(inspector.warnings(false).len() <= 11);
}

/// The requests of this service.
pub fn requests(bytes: &[u8]) {
    if let Ok(request) = GenerateCodeRequest::decode(bytes)
        && let Ok(question) = Question::check(request, None)
    {
        assert_eq!(strip(&question.text), question.text.as_str());
        assert!(question.body("model", Scheduling::default()).is_ok());
    }
    if let Ok(request) = CompleteCodeRequest::decode(bytes) {
        completion::fuzz(request);
    }
    if let Ok(request) = ValidateCodeRequest::decode(bytes) {
        let _ = validate::validate_request(&request);
    }
}

/// Code, in the language that the first byte says.
pub fn code(bytes: &[u8]) {
    let Some((language, rest)) = bytes.split_first() else { return };
    let words = ["py", "js", "ts", "tsx", "java", "cpp", "cs"];
    let word = words[usize::from(*language) % words.len()];
    let (Some(language), Ok(code)) = (Language::named(word), std::str::from_utf8(rest)) else {
        return;
    };
    let lines = code.lines().count().max(1);
    if let Some(report) = validate::analyse(code, language, Duration::from_millis(200), true) {
        assert!(report.findings.iter().all(|finding| finding.line <= lines));
    }
}

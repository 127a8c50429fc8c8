//! Reads texts and end markers from response bodies.

use std::borrow::Cow;

use anyhow::{Context as _, bail, ensure};
use hapa_proto::codegen::v1::stream_generate_code_response::Event;
use hapa_proto::codegen::v1::{GenerateCodeResponse, StreamGenerateCodeResponse};
use http::HeaderMap;
use prost::Message as _;
use serde::Deserialize;

/// Length of the head of a gRPC message.
const MESSAGE_HEAD_LEN: usize = 5;
const COMPRESSED: u8 = 0x01;
const TRAILERS: u8 = 0x80;

/// The protocol of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Server-sent events with OpenAI's JSON.
    Events,
    /// One JSON document.
    Json,
    GrpcStream,
    GrpcCall,
}

/// A body that is read.
#[derive(Debug)]
pub(crate) struct Decoder {
    format: Format,
    unread: Vec<u8>,
    pub(crate) is_done: bool,
}

#[derive(Deserialize)]
struct ChatMessage<'a> {
    #[serde(borrow, default)]
    choices: Vec<ChatChoice<'a>>,
    error: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct ChatChoice<'a> {
    #[serde(borrow, alias = "message")]
    delta: Option<ChatContent<'a>>,
}

#[derive(Deserialize)]
struct ChatContent<'a> {
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
}

impl Decoder {
    pub(crate) fn new(format: Format) -> Self {
        Decoder { format, unread: Vec::new(), is_done: false }
    }

    /// Reads what came, and passes each text on.
    pub(crate) fn feed(
        &mut self,
        data: &[u8],
        on_text: &mut impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.unread.extend_from_slice(data);
        match self.format {
            Format::Json => Ok(()),
            Format::Events => self.events(on_text),
            Format::GrpcStream | Format::GrpcCall => self.messages(on_text),
        }
    }

    /// Reads what is complete only at the end of the body.
    pub(crate) fn end(
        &mut self,
        on_text: &mut impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        if self.format == Format::Json {
            chat(&self.unread, on_text)?;
            self.is_done = true;
        }
        Ok(())
    }

    /// Reads the status from headers or trailers of gRPC, if they have one.
    pub(crate) fn status(&mut self, headers: &HeaderMap) -> anyhow::Result<()> {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        match text("grpc-status") {
            None => {}
            Some("0") => self.is_done = true,
            Some(code) => bail!("grpc-status {code}: {}", text("grpc-message").unwrap_or_default()),
        }
        Ok(())
    }

    fn events(
        &mut self,
        on_text: &mut impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut start = 0;
        while let Some(length) = memchr::memchr(b'\n', &self.unread[start..]) {
            let line = self.unread[start..start + length].trim_ascii_end();
            start += length + 1;
            match line.strip_prefix(b"data:").map(<[u8]>::trim_ascii_start) {
                None => {}
                Some(b"[DONE]") => self.is_done = true,
                Some(data) => chat(data, on_text)?,
            }
        }
        self.unread.drain(..start);
        Ok(())
    }

    fn messages(
        &mut self,
        on_text: &mut impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut start = 0;
        while let Some(&[flags, a, b, c, d]) =
            self.unread[start..].first_chunk::<MESSAGE_HEAD_LEN>()
        {
            let begin = start + MESSAGE_HEAD_LEN;
            let length = usize::try_from(u32::from_be_bytes([a, b, c, d]))?;
            let Some(message) = self.unread.get(begin..begin + length) else { break };
            start = begin + length;
            ensure!(flags & COMPRESSED == 0, "a compressed message");
            if flags & TRAILERS != 0 {
                let trailers = str::from_utf8(message)?.to_ascii_lowercase();
                let status = trailers.lines().find_map(|line| line.strip_prefix("grpc-status:"));
                let status = status.context("trailers without a status")?.trim();
                ensure!(status == "0", "trailers of gRPC-Web: {trailers}");
                self.is_done = true;
            } else if self.format == Format::GrpcCall {
                on_text(&GenerateCodeResponse::decode(message)?.generated_code)?;
            } else {
                match StreamGenerateCodeResponse::decode(message)?.event {
                    Some(Event::Delta(delta)) => on_text(&delta.text)?,
                    Some(Event::Failed(failed)) => bail!("failed: {}", failed.message),
                    _ => {}
                }
            }
        }
        self.unread.drain(..start);
        Ok(())
    }
}

fn chat(data: &[u8], on_text: &mut impl FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let message: ChatMessage<'_> = serde_json::from_slice(data)?;
    ensure!(message.error.is_none(), "{}", String::from_utf8_lossy(data));
    let texts = message.choices.iter().filter_map(|choice| choice.delta.as_ref()?.content.as_ref());
    for text in texts.filter(|text| !text.is_empty()) {
        on_text(text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(format: Format, pieces: &[&[u8]]) -> (String, bool) {
        let (mut decoder, mut all) = (Decoder::new(format), String::new());
        for piece in pieces {
            let mut on_text = |text: &str| {
                all.push_str(text);
                Ok(())
            };
            decoder.feed(piece, &mut on_text).unwrap();
        }
        (all, decoder.is_done)
    }

    #[test]
    fn events_may_be_split_anywhere() {
        let body = "data: {\"choices\":[{\"delta\":{\"content\":\" 가나\"}}]}\r\n\r\n: ping\n\ndata: {\"choices\":[],\"usage\":{}}\n\ndata: [DONE]\n\n";
        for at in 0..body.len() {
            let (left, right) = body.as_bytes().split_at(at);
            assert_eq!(texts(Format::Events, &[left, right]), (" 가나".to_owned(), true));
        }
    }

    #[test]
    fn messages_of_grpc_web_may_be_split_anywhere() {
        let delta = [0, 0, 0, 0, 6, 0x1a, 4, 0x0a, 2, b'a', b'b'];
        let trailers = b"\x80\0\0\0\x0fgrpc-status:0\r\n";
        let body = [&delta[..], trailers].concat();
        for at in 0..body.len() {
            let (left, right) = body.split_at(at);
            assert_eq!(texts(Format::GrpcStream, &[left, right]), ("ab".to_owned(), true));
        }
    }
}

//! Formats of the fields of log lines. Fields with the prefix `otel.` are omitted: they are for the OpenTelemetry layer.

use std::error::Error;
use std::fmt::{self, Debug};

use tracing::field::{Field, Visit};
use tracing::span::Record;
use tracing_subscriber::field::{RecordFields, VisitOutput as _};
use tracing_subscriber::fmt::format::{DefaultVisitor, JsonFields, JsonVisitor, Writer};
use tracing_subscriber::fmt::{FormatFields, FormattedFields};

/// Fields as JSON.
#[derive(Debug, Default)]
pub(super) struct JsonFormat(JsonFields);

/// Fields as text.
#[derive(Debug)]
pub(super) struct TextFormat;

/// Forwards all fields except those for the OpenTelemetry layer.
struct LoggedFields<'v>(&'v mut dyn Visit);

impl<'w> FormatFields<'w> for JsonFormat {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut visitor = JsonVisitor::new(&mut writer);
        fields.record(&mut LoggedFields(&mut visitor));
        visitor.finish()
    }

    /// Fields that are recorded after the creation of a span are all logged.
    fn add_fields(
        &self,
        current: &'w mut FormattedFields<Self>,
        fields: &Record<'_>,
    ) -> fmt::Result {
        let mut whole = FormattedFields::new(std::mem::take(&mut current.fields));
        let added = self.0.add_fields(&mut whole, fields);
        current.fields = whole.fields;
        added
    }
}

impl<'w> FormatFields<'w> for TextFormat {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut visitor = DefaultVisitor::new(writer, true);
        fields.record(&mut LoggedFields(&mut visitor));
        visitor.finish()
    }
}

impl LoggedFields<'_> {
    fn forward(&mut self, field: &Field, value: impl FnOnce(&mut dyn Visit)) {
        if !field.name().starts_with("otel.") {
            value(self.0);
        }
    }
}

impl Visit for LoggedFields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.forward(field, |visitor| visitor.record_debug(field, value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.forward(field, |visitor| visitor.record_str(field, value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.forward(field, |visitor| visitor.record_bool(field, value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.forward(field, |visitor| visitor.record_i64(field, value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.forward(field, |visitor| visitor.record_u64(field, value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.forward(field, |visitor| visitor.record_f64(field, value));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.forward(field, |visitor| visitor.record_error(field, value));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use tracing::field::Empty;
    use tracing::subscriber::with_default;
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::{fmt, registry};

    use super::*;

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Output {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn log_in_span() {
        let call = tracing::error_span!(
            "call",
            otel.name = "A/Do",
            otel.kind = "server",
            rpc = "/A/Do",
            later = Empty,
            last = Empty
        );
        call.record("later", "on");
        call.record("last", 1.5);
        call.in_scope(|| tracing::error!(count = 3_u64, less = -3, known = true, "words"));
    }

    #[test]
    fn json_lines_have_typed_fields_without_those_for_opentelemetry() {
        let output = Output::default();
        let other = output.clone();
        let lines = fmt::layer().json().fmt_fields(JsonFormat::default());
        with_default(registry().with(lines.with_writer(move || other.clone())), log_in_span);
        let line: serde_json::Value = serde_json::from_str(&output.text()).unwrap();
        let span =
            serde_json::json!({ "name": "call", "rpc": "/A/Do", "later": "on", "last": 1.5 });
        assert_eq!((&line["span"], &line["spans"]), (&span, &serde_json::json!([span])));
        let fields =
            serde_json::json!({ "message": "words", "count": 3, "less": -3, "known": true });
        assert_eq!(line["fields"], fields);
    }

    #[test]
    fn text_lines_have_no_fields_for_opentelemetry() {
        let output = Output::default();
        let other = output.clone();
        let lines = fmt::layer().compact().with_ansi(false).fmt_fields(TextFormat);
        with_default(registry().with(lines.with_writer(move || other.clone())), log_in_span);
        let line = output.text();
        let end = "words count=3 less=-3 known=true rpc=\"/A/Do\" later=\"on\" last=1.5\n";
        assert!(line.ends_with(end) && !line.contains("otel"), "{line}");
    }
}

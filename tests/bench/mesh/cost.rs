//! Processor time per token, beside a plain Envoy that proxies the same stream. Short sections alternate, so
//! that other load of the machine affects all of them.

use std::time::Duration;

use crate::caller::Way;
use crate::report::{Table, times, verdict};
use crate::stage::Stage;
use crate::streams::{Load, StreamReport, hold};

const WAYS: [Way; 3] = [Way::PlainEnvoy, Way::Mesh, Way::GatewayJson];
const TARGET: f64 = 2.0;

/// Streams and the gap between their tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) streams: usize,
    pub(crate) gap: Duration,
}

pub(crate) async fn measure(
    stage: &mut Stage,
    Pace { streams, gap }: Pace,
    sections: usize,
    lasts: Duration,
) -> anyhow::Result<Table> {
    let mut sums = WAYS.map(|_| StreamReport::default());
    for section in 0..sections {
        for turn in 0..WAYS.len() {
            let at = (section + turn) % WAYS.len();
            let seen = hold(stage, Load { way: WAYS[at], streams, gap, lasts }).await?;
            let sum = &mut sums[at];
            sum.tokens += seen.tokens;
            sum.cpu.hapa += seen.cpu.hapa;
            sum.cpu.gateway += seen.cpu.gateway;
            sum.cpu.plain += seen.cpu.plain;
            sum.busy = sum.busy.max(seen.busy);
        }
    }
    Ok(table(format!("Processor time per token, {streams} streams, {}", pace(gap)), &sums))
}

pub(crate) fn pace(gap: Duration) -> String {
    if gap == Duration::ZERO {
        "as fast as they go".to_owned()
    } else {
        format!("a token every {gap:?}")
    }
}

fn table(title: String, [plain, mesh, json]: &[StreamReport; 3]) -> Table {
    let head = ["", "us a token", "to Envoy's", "tokens", "machine busy", "target"];
    let mut table = Table::new(title, &head);
    let yardstick = micros(plain.cpu.plain, plain.tokens);
    let mut row = |name: &str, cpu, seen: &StreamReport, has_target| {
        let cost = micros(cpu, seen.tokens);
        let ratio = cost / yardstick;
        let target = if has_target { verdict(ratio, "<=", TARGET, "x") } else { String::new() };
        let busy = format!("{:.0}%", seen.busy * 100.0);
        let cost = format!("{cost:.1}");
        table.row([name.into(), cost, times(ratio), seen.tokens.to_string(), busy, target]);
    };
    row("plain Envoy, SSE to SSE", plain.cpu.plain, plain, false);
    row("hapa, SSE to gRPC", mesh.cpu.hapa, mesh, true);
    row("hapa behind the gateway", json.cpu.hapa, json, true);
    row("the gateway, gRPC to JSON as SSE", json.cpu.gateway, json, false);
    table
}

pub(crate) fn micros(cpu: Duration, tokens: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let tokens = tokens as f64;
    cpu.as_secs_f64() * 1e6 / tokens
}

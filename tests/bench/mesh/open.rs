//! Memory of an open stream, and the effect of hundreds of streams on token intervals. The processes must be
//! new, because freed memory is reused without being visible.

use std::time::Duration;

use crate::caller::{Caller, Way};
use crate::engine::Play;
use crate::gauge::ratio;
use crate::report::{Table, ms, verdict};
use crate::stage::Stage;
use crate::streams::{Load, StreamReport, hold};

const WAYS: [Way; 4] = [Way::Direct, Way::PlainEnvoy, Way::Mesh, Way::Gateway];
const TARGET_KIB: f64 = 64.0;
/// Loads code and pools before memory is measured.
const WARM_UP: usize = 20;

pub(crate) async fn measure(
    stage: &mut Stage,
    streams: usize,
    gap: Duration,
    lasts: Duration,
) -> anyhow::Result<Table> {
    warm_up(stage).await?;
    let mut seen = Vec::new();
    for way in WAYS {
        seen.push(hold(stage, Load { way, streams, gap, lasts }).await?);
    }
    Ok(table(&seen, streams, gap))
}

async fn warm_up(stage: &mut Stage) -> anyhow::Result<()> {
    stage.engine.play(Play { tokens: 8, gap: Duration::ZERO, silence: None }).await?;
    for way in WAYS {
        let mut caller = Caller::one(stage, way).await?;
        for _ in 0..WARM_UP {
            caller.ask().await?;
            caller.drain().await?;
        }
    }
    Ok(())
}

fn table(seen: &[StreamReport], streams: usize, gap: Duration) -> Table {
    let title = format!("{streams} open streams, a token every {gap:?}; off the beat in ms");
    let head =
        ["", "KiB a stream", "off: median", "p99", "added median", "added p99", "busy", "target"];
    let mut table = Table::new(title, &head);
    let direct = &seen[0].deviations;
    for (way, seen) in WAYS.iter().zip(seen) {
        let (grown, name) = match way {
            Way::Direct => (None, way.name().to_owned()),
            Way::PlainEnvoy => (Some(seen.grown.plain), way.name().to_owned()),
            Way::Mesh => (Some(seen.grown.hapa), "the mesh (hapa), gRPC".to_owned()),
            // What hapa used before is used again, so only Envoy's memory can be read here.
            _ => (Some(seen.grown.gateway), "the gateway (its Envoy), gRPC".to_owned()),
        };
        let kib = grown.map(|bytes| ratio(bytes, streams as u64 * 1024));
        let target = kib.filter(|_| *way == Way::Mesh);
        let (median, p99) = (seen.deviations.median(), seen.deviations.p99());
        table.row([
            name,
            kib.map(|kib| format!("{kib:.1}")).unwrap_or_default(),
            ms(median),
            ms(p99),
            ms(median - direct.median()),
            ms(p99 - direct.p99()),
            format!("{:.0}%", seen.busy * 100.0),
            target.map(|kib| verdict(kib, "<", TARGET_KIB, " KiB")).unwrap_or_default(),
        ]);
    }
    table
}

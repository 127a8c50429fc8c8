//! The cost of tracing: answers of a mesh that exports spans beside those of a mesh that creates none, in
//! turn. The collector runs in this process, outside the measured ones.

use hapa_test_harness::TraceCollector;

use crate::Binaries;
use crate::gauge::ratio;
use crate::report::{Table, times};
use crate::share::{ANSWER, FOLLOWED, Load, answer, pace, quarter};
use crate::stage::Stage;

pub(crate) async fn measure(
    binaries: &Binaries,
    loads: [Load; 2],
    sections: usize,
) -> anyhow::Result<Vec<Table>> {
    let collector = TraceCollector::start().await;
    let mut stages = [
        Stage::start(binaries, None).await?,
        Stage::start(binaries, Some(&collector.url())).await?,
    ];
    let mut tables = Vec::new();
    for load in loads {
        let (mut costs, before) = ([const { Vec::new() }; 2], collector.spans().len());
        for section in 0..sections {
            for turn in 0..stages.len() {
                let at = (section + turn) % stages.len();
                costs[at].push(answer(&mut stages[at], load, FOLLOWED).await?);
            }
        }
        let spans = collector.spans().len() - before;
        tables.push(table(load, &costs, ratio(spans as u64, (sections * load.all()) as u64)));
    }
    Ok(tables)
}

fn table(load: Load, [off, on]: &[Vec<f64>; 2], spans: f64) -> Table {
    let title = format!(
        "Processor time of an answer of {ANSWER} tokens, {} streams, {}, median of {} sections",
        load.streams,
        pace(load.gap),
        on.len(),
    );
    let mut table = Table::new(title, &["", "us an answer", "to none", "spans an answer"]);
    let ratios: Vec<_> = on.iter().zip(off).map(|(on, off)| on / off).collect();
    table.row([
        "no spans".to_owned(),
        format!("{:.0}", quarter(off, 2)),
        String::new(),
        String::new(),
    ]);
    table.row([
        "spans to a collector".to_owned(),
        format!("{:.0}", quarter(on, 2)),
        times(quarter(&ratios, 2)),
        format!("{spans:.1}"),
    ]);
    table
}

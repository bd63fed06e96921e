//! Figures of this member in the Prometheus text format. Answers without a leader and without a quorum:
//! figures of the cloud are those that this member has, and absent while it must not answer from them.

use crate::app::Consistency;
use crate::http::{About, ApiState};
use crate::registry::Figures;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header;
use mainstay_model::State as Cloud;
use mainstay_raft::{Agreement, Role, Status};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The text format's version that is spoken.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

#[utoipa::path(get, path = "/metrics", tag = "health", operation_id = "get_metrics",
    summary = "Figures in the Prometheus text format",
    responses((status = 200, description = "Figures of this member, and of the cloud as it sees it", body = String, content_type = "text/plain")))]
pub(super) async fn metrics(State(api): State<ApiState>) -> Response {
    let group = api.app.group();
    let mut page = Page::default();
    about(&mut page, &api.about);
    if let Some(tunnels) = &api.tunnels {
        let open = "Tunnels to VMs through this member, those that it relays for others counted.";
        page.gauge("tunnels", open, tunnels.open_now());
    }
    consensus(&mut page, &group.status());
    agreement(&mut page, &group.agreement().borrow());
    if let Ok(state) = api.app.read(Consistency::Stale).await {
        cloud(&mut page, &state);
    }
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], page.0).into_response()
}

/// A page of the text format.
#[derive(Default)]
struct Page(String);

impl Page {
    /// A metric with one value.
    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.gauges(name, help, &[("", value)]);
    }

    /// A metric that only grows while the process runs.
    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.metric("counter", name, help, &[("", value)]);
    }

    /// A metric with one value for each set of labels (`{key="value"}`).
    fn gauges(&mut self, name: &str, help: &str, values: &[(&str, u64)]) {
        self.metric("gauge", name, help, values);
    }

    fn metric(&mut self, kind: &str, name: &str, help: &str, values: &[(&str, u64)]) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP mainstay_{name} {help}");
        let _ = writeln!(self.0, "# TYPE mainstay_{name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(self.0, "mainstay_{name}{labels} {value}");
        }
    }
}

fn about(page: &mut Page, about: &About) {
    let version = format!("{{version=\"{}\"}}", about.version);
    page.gauges("build_info", "The release that runs.", &[(&version, 1)]);
    let db = "Bytes of log and state on disk.";
    page.gauge("db_bytes", db, (about.db_size)());
    if let Some(disk) = (about.disk)() {
        let free = "Bytes free on the disk with the data directory.";
        page.gauge("disk_free_bytes", free, disk.free);
        page.gauge("disk_total_bytes", "Size of that disk.", disk.total);
    }
    let low = "1 while that disk has too little room for pushes.";
    page.gauge("disk_low", low, u64::from((about.complaint)().is_some()));
    registry(page, &(about.registry)());
}

fn registry(page: &mut Page, figures: &Figures) {
    let chunks = &figures.chunks;
    page.gauge("chunks", "Chunks held.", chunks.chunks);
    let stored = "Bytes they take, compressed.";
    page.gauge("chunk_stored_bytes", stored, chunks.stored_bytes);
    page.gauge("chunk_packs", "Packs on disk.", chunks.packs);
    let packs = "Bytes of the packs on disk.";
    page.gauge("chunk_pack_bytes", packs, chunks.pack_bytes);
    let damaged = "Chunks found damaged and not fetched again yet.";
    page.gauge("chunks_damaged", damaged, chunks.damaged);
    let broken = "Tags that this member held and that are not whole any more.";
    page.gauge("tags_broken", broken, figures.broken_tags);
    let copies = &figures.replication;
    let lacking = "Tags and artifacts that this member does not hold yet.";
    page.gauge("replicate_lacking", lacking, copies.lacking);
    let fetched = "Chunks fetched from other members.";
    page.counter("fetched_chunks_total", fetched, copies.fetched_chunks);
    let fetched = "Bytes of chunks fetched from other members, as sent.";
    page.counter("fetched_bytes_total", fetched, copies.fetched_bytes);
    let ahead = "Bytes of chunks sent to other members before their tag was committed.";
    page.counter("sent_ahead_bytes_total", ahead, figures.ahead.bytes);
    let looked = "Tags and artifacts that replication looked at.";
    page.counter("replicate_looked_total", looked, copies.looked_at);
    let sent = "Chunks sent to clients and nodes.";
    page.counter("sent_chunks_total", sent, figures.sent.chunks);
    let sent = "Bytes of chunks sent to clients and nodes, as sent.";
    page.counter("sent_bytes_total", sent, figures.sent.bytes);
    let left_out = "Chunks that nodes were to get from other nodes instead.";
    page.counter(
        "sent_elsewhere_chunks_total",
        left_out,
        figures.sent.left_out,
    );
    let gc = &figures.collections;
    if let Some(last) = &gc.last {
        page.gauges(
            "gc_chunk_bytes",
            "Stored bytes by what the last collection found.",
            &[
                ("{state=\"live\"}", last.live_bytes),
                ("{state=\"waiting\"}", last.waiting_bytes),
                ("{state=\"dead\"}", last.dead_bytes),
            ],
        );
    }
    page.counter("gc_runs_total", "Collections.", gc.runs);
    let refused = "Collections that removed nothing because they could not be sure.";
    page.counter("gc_refusals_total", refused, gc.refusals);
    let removed = "Chunks removed.";
    page.counter("gc_removed_chunks_total", removed, gc.removed_chunks);
    let freed = "Bytes given back.";
    page.counter("gc_freed_bytes_total", freed, gc.freed_bytes);
    let scrub = &figures.scrubs;
    page.counter("scrub_rounds_total", "Whole rounds.", scrub.rounds);
    page.counter("scrub_chunks_total", "Chunks verified.", scrub.chunks);
    page.counter("scrub_bytes_total", "Bytes verified.", scrub.bytes);
    let found = "Chunks that verification found damaged.";
    page.counter("scrub_damaged_total", found, scrub.damaged);
    let ended = "End of the last whole round, in seconds since the Unix epoch.";
    page.gauge("scrub_last_end_seconds", ended, scrub.ended_ms / 1000);
}

fn consensus(page: &mut Page, status: &Status) {
    let up = "1 unless this member has stopped for good.";
    page.gauge("up", up, u64::from(status.fault.is_none()));
    page.gauge("raft_term", "Term.", status.term);
    let last = "Last log index, on disk or queued.";
    page.gauge("raft_last_log_index", last, status.last_log);
    page.gauge("raft_applied_index", "Applied index.", status.applied);
    let leads = "1 if this member leads.";
    page.gauge("raft_is_leader", leads, u64::from(status.is_leader()));
    let unfit = "Reasons why this member should not lead.";
    page.gauge("raft_unfit_reasons", unfit, status.unfit.len() as u64);
    let has = "1 if this member knows a leader.";
    page.gauge("raft_has_leader", has, u64::from(status.leader.is_some()));
    let voters = status.members.values().filter(|m| m.role == Role::Voter);
    let voters = voters.count();
    let learners = status.members.len() - voters;
    page.gauges(
        "raft_members",
        "Members by role.",
        &[
            ("{role=\"voter\"}", voters as u64),
            ("{role=\"learner\"}", learners as u64),
        ],
    );
}

fn agreement(page: &mut Page, seen: &Agreement) {
    let agreed = "Highest index at which this member's state was found equal to another's.";
    page.gauge("state_agreed_index", agreed, seen.agreed.unwrap_or(0));
    let differing = "Members whose state differs from this one's at an equal index.";
    let count = seen.differing.len() as u64;
    page.gauge("state_differing_members", differing, count);
    let diverged = "1 if a majority holds another state than this member.";
    page.gauge("state_diverged", diverged, u64::from(seen.diverged));
}

fn cloud(page: &mut Page, cloud: &Cloud) {
    let mut by_state = BTreeMap::<_, u64>::new();
    for instance in cloud.instances.values() {
        let label = format!("{{state=\"{}\"}}", instance.state.as_str());
        *by_state.entry(label).or_default() += 1;
    }
    let by_state: Vec<_> = by_state.iter().map(|(l, n)| (l.as_str(), *n)).collect();
    page.gauges("instances", "Instances by state.", &by_state);
    let level = "Feature level in use.";
    page.gauge("features", level, cloud.features.into());
    page.gauge("nodes", "Nodes.", cloud.nodes.len() as u64);
    let templates = cloud.templates.values().filter(|t| t.latest().is_some());
    page.gauge("templates", "Visible templates.", templates.count() as u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_help_type_and_value_of_each_metric() {
        let mut page = Page::default();
        page.gauges("x", "An x.", &[("{a=\"1\"}", 2), ("{a=\"2\"}", 3)]);
        let expected = "# HELP mainstay_x An x.\n# TYPE mainstay_x gauge\nmainstay_x{a=\"1\"} 2\nmainstay_x{a=\"2\"} 3\n";
        assert_eq!(page.0, expected);
    }
}

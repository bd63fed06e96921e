//! Timing and bounds of a member. Knows no configuration file.

use std::time::Duration;

/// Timing and bounds.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// This member.
    pub id: u64,
    /// Shown in logs and checked by peers.
    pub cluster_id: String,
    /// Leader's heartbeat.
    pub heartbeat: Duration,
    /// Election timeout range. A leader that falls silent is replaced after its lease (the upper
    /// end) plus a random time from the range.
    pub election: (Duration, Duration),
    /// A snapshot is taken after this many log bytes.
    pub snapshot_log_bytes: u64,
    /// Entries kept behind a snapshot for slow members.
    pub keep_entries: u64,
    /// A command is proposed again only while the log has not grown by more entries than this since
    /// the first attempt. With what may come in between, the machine must remember twice as many.
    pub retry_entries: u64,
    /// A learner becomes a voter when it has been close to the end of the log, and answered, for
    /// so long without a break.
    pub promote_after: Duration,
    /// Longest time between two checkpoints of changed state.
    pub checkpoint_interval: Duration,
    /// A member whose disk was too slow to lead is trusted again after this long without a slow write.
    pub slow_disk_calm: Duration,
}

impl GroupConfig {
    /// Sensible timing for members in one site (round trips of milliseconds, disks whose bad
    /// fsyncs take hundreds of milliseconds).
    ///
    /// * Heartbeat 50 ms, election 300 to 600 ms: a leader that falls silent is replaced in 0.9 to
    ///   1.2 s; one whose process has ended, at once (see `group::succession`). Half of it (150 to
    ///   300 ms) calls elections when a busy two-core machine does not schedule a member for
    ///   0.3 s. Fsyncs do not matter here: heartbeats do not wait for the disk.
    /// * A snapshot every 64 MiB of log, 20,000 entries kept behind it: a member that was away for
    ///   a minute under load catches up from the log.
    /// * A learner is promoted after a steady second: longer than a leader's lease, so that one which
    ///   comes and goes, or is paused by its disk, is seen to.
    /// * A checkpoint every 250 ms or 1 MiB of changes: a few hundred milliseconds of log to apply
    ///   again after a crash, without large flushes that stall the log's fsyncs.
    pub fn new(id: u64, cluster_id: impl Into<String>) -> Self {
        Self {
            id,
            cluster_id: cluster_id.into(),
            heartbeat: Duration::from_millis(50),
            election: (Duration::from_millis(300), Duration::from_millis(600)),
            snapshot_log_bytes: 64 << 20,
            keep_entries: 20_000,
            retry_entries: 32_768,
            promote_after: Duration::from_secs(1),
            checkpoint_interval: Duration::from_millis(250),
            slow_disk_calm: Duration::from_secs(60),
        }
    }

    /// Snapshots after so many bytes of log; what is kept behind them shrinks and grows with it.
    #[must_use]
    pub fn snapshot_every(mut self, log_bytes: u64) -> Self {
        let kept = self.keep_entries.saturating_mul(log_bytes) / self.snapshot_log_bytes;
        self.keep_entries = kept.clamp(100, self.keep_entries);
        self.snapshot_log_bytes = log_bytes;
        self
    }

    /// The consensus library's view of it.
    pub(crate) fn core(&self) -> Result<openraft::Config, openraft::ConfigError> {
        let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let lease_ms = ms(self.election.1);
        openraft::Config {
            cluster_name: self.cluster_id.clone(),
            heartbeat_interval: ms(self.heartbeat),
            election_timeout_min: ms(self.election.0),
            election_timeout_max: lease_ms,
            max_payload_entries: 2048,
            // Snapshots by log bytes and purges when nobody needs the log: see group::upkeep.
            snapshot_policy: openraft::SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: u64::MAX,
            // A leader that hears no quorum falls silent from time to time, so that members that
            // hear it, but whom it does not hear, may elect another.
            quorum_loss_probe_interval: Some(lease_ms.saturating_mul(2)),
            enable_pre_vote: Some(true),
            // The committed mark is written lazily: a restarted leader must be elected again.
            enable_leader_restore: Some(false),
            // Or a leader stops when it sees that a follower has lost entries.
            #[cfg(feature = "seeded-bugs")]
            allow_log_reversion: Some(crate::seeded::bug("lost-write")),
            ..openraft::Config::default()
        }
        .validate()
    }
}

//! The only clock and the only source of ids in the controller. Everything replicated is stamped here.

use mainstay_model::pace::Pace;
use mainstay_model::{CommandId, InstanceId, SaveId, TemplateId};
use parking_lot::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// The time that this member stamps commands with: its clock's, unless the state's clock is ahead of it
/// (see [`Pace`]).
#[derive(Debug)]
pub struct Stamps {
    begun: Instant,
    pace: Mutex<Pace>,
}

impl Default for Stamps {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            pace: Mutex::default(),
        }
    }
}

impl Stamps {
    /// Milliseconds since the Unix epoch, at or after the state's clock.
    pub fn now_ms(&self, state_clock_ms: u64) -> u64 {
        let passed = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.pace.lock().now(now_ms(), passed, state_clock_ms)
    }
}

/// A fresh command id.
pub fn command_id() -> CommandId {
    CommandId(uuid::Uuid::new_v4().as_u128())
}

/// A fresh instance id.
pub fn instance_id() -> InstanceId {
    InstanceId::from(uuid::Uuid::new_v4().to_string())
}

/// A fresh template id.
pub fn template_id() -> TemplateId {
    TemplateId::from(uuid::Uuid::new_v4().to_string())
}

/// A fresh id of a save.
pub fn save_id() -> SaveId {
    SaveId::from(uuid::Uuid::new_v4().to_string())
}

/// A fresh member id: random and nonzero.
pub fn member_id() -> u64 {
    loop {
        let id = uuid::Uuid::new_v4().as_u64_pair().0;
        if id != 0 {
            return id;
        }
    }
}

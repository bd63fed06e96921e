//! The only clock and the only source of ids in the controller. Everything replicated is stamped here.

use mainstay_model::{CommandId, InstanceId, TemplateId};
use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
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

/// A fresh member id: random and nonzero.
pub fn member_id() -> u64 {
    loop {
        let id = uuid::Uuid::new_v4().as_u64_pair().0;
        if id != 0 {
            return id;
        }
    }
}

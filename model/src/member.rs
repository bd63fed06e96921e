//! Controllers, as far as the replicated state knows them: only those that were taken out.

use serde::{Deserialize, Serialize};

/// A member that an operator removed or replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// Its name then; another identity may carry it now.
    pub name: String,
    /// When, by the state's clock.
    pub at_ms: u64,
}

//! The node agent: joins by a controller list, receives its whole desired set with a generation,
//! converges, reports what it observes. Knows nothing of consensus or of the controller's state.
//!
//! * [`wire`]: what agent and controller say to each other (JSON over HTTP).
//! * [`driver`]: what runs VMs: `qemu` (real), `fake` (scale tests).

pub mod driver;
pub mod transfer;
pub mod wire;

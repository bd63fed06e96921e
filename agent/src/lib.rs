//! The node agent: joins by a controller list, receives its whole desired set with a generation,
//! converges, reports what it observes. Knows nothing of consensus or of the controller's state.
//!
//! * [`agent`]: one running agent, put together from the parts below.
//! * [`join`]: the tests that `node join` prints before it serves.
//! * [`sync`]: the connection to the controllers.
//! * [`converge`]: what must happen so that the node runs what it shall run, and who does it.
//! * [`cache`] keeps images.
//! * [`share`]: chunks of them for other nodes.
//! * [`tunnel`]: ends of what members carry to VMs.
//! * [`wire`]: what agent and controller say to each other (JSON over HTTP).
//! * [`driver`]: what runs VMs: `qemu` (real), `fake` (scale tests).

pub mod agent;
pub mod cache;
pub mod converge;
pub mod driver;
pub mod join;
pub mod share;
pub mod sync;
pub mod transfer;
pub mod tunnel;
pub mod wire;

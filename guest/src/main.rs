//! The guest agent of the tiny guest.
fn main() {}

//! Real VMs (in work).

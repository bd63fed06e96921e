//! Tests that cross the seams between parts. This file is a list of modules, nothing else.

//! Every story in one binary.

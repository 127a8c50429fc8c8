//! Usage events, occurrences, incidents, and their delivery by the outbox.

mod incidents;
mod outbox;
mod outbox_killed;
mod reasoning;
mod recording;
mod usage;

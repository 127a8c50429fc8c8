//! Events as the outbox stores them, with their kinds and priorities.

/// The kind of an event. Each kind has its own relay, so that a failing receiver does not delay the other kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EventKind {
    Usage,
    Occurrence,
}

impl EventKind {
    pub(super) const ALL: [EventKind; 2] = [EventKind::Usage, EventKind::Occurrence];

    /// The value of the metric label `kind`.
    pub(super) fn label(self) -> &'static str {
        match self {
            EventKind::Usage => "usage",
            EventKind::Occurrence => "occurrence",
        }
    }

    /// The priorities of the kind, highest first.
    pub(super) fn priorities(self) -> &'static [Priority] {
        match self {
            EventKind::Usage => &[Priority::FailedUsage, Priority::Usage],
            EventKind::Occurrence => &[Priority::Occurrence],
        }
    }
}

/// The priority of an event, lowest first. Its number is stored in the column `rank`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Priority {
    Usage = 0,
    FailedUsage = 1,
    Occurrence = 2,
}

impl Priority {
    pub(super) const ALL: [Priority; 3] =
        [Priority::Usage, Priority::FailedUsage, Priority::Occurrence];

    pub(super) fn kind(self) -> EventKind {
        if self == Priority::Occurrence { EventKind::Occurrence } else { EventKind::Usage }
    }
}

/// An event before it is stored.
#[derive(Debug)]
pub(super) struct EncodedEvent {
    pub(super) priority: Priority,
    /// The protobuf message.
    pub(super) body: Vec<u8>,
}

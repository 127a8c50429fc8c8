//! Kinds and priorities of events.

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

/// The priority of an event, lowest first. Each priority has its own log.
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

    /// The beginning of the names of its files.
    pub(super) fn file_name(self) -> &'static str {
        match self {
            Priority::Usage => "usage",
            Priority::FailedUsage => "failed-usage",
            Priority::Occurrence => "occurrence",
        }
    }
}

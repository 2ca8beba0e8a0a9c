//! Three answers to every question about the host: present, absent, could not see.

/// What a look found. *Unknown* never counts as *absent*: nothing is removed because of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen<T> {
    /// It is there.
    Present(T),
    /// It is definitely not there.
    Absent,
    /// Could not be seen; the reason is one lower-case line.
    Unknown(String),
}

impl<T> Seen<T> {
    /// The value when present.
    pub fn present(&self) -> Option<&T> {
        match self {
            Seen::Present(value) => Some(value),
            Seen::Absent | Seen::Unknown(_) => None,
        }
    }

    /// True only for a definite absence.
    pub fn is_absent(&self) -> bool {
        matches!(self, Seen::Absent)
    }

    /// Applies `f` to a present value.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Seen<U> {
        match self {
            Seen::Present(value) => Seen::Present(f(value)),
            Seen::Absent => Seen::Absent,
            Seen::Unknown(why) => Seen::Unknown(why),
        }
    }

    /// As `map`, for an `f` that can itself find out that the value is no good.
    pub fn and_then<U>(self, f: impl FnOnce(T) -> Seen<U>) -> Seen<U> {
        match self {
            Seen::Present(value) => f(value),
            Seen::Absent => Seen::Absent,
            Seen::Unknown(why) => Seen::Unknown(why),
        }
    }
}

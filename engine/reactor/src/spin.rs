//! How long to look for completions before sleeping.
//!
//! A wake-up costs tens of microseconds on each side, so a short look saves latency when the next
//! event is close. It burns a core when it is not, so the budget is spent only while it pays: after a
//! run of failed looks only one sleep in many is preceded by one.

/// Of the last 32 looks, so many must have found something for the next to be worth it.
const MIN_HITS: u32 = 8;
/// How many sleeps without a look go by before looking is tried again.
const PROBE_EVERY: u32 = 64;

/// Decides whether to spin. Time is measured by the caller.
#[derive(Debug)]
pub struct Spinner {
    budget_ns: u64,
    /// A bit for each of the last 32 looks, set where something came.
    history: u32,
    skipped: u32,
}

impl Spinner {
    /// A spinner that looks for at most `budget_ns` nanoseconds; 0 never looks.
    #[must_use]
    pub fn new(budget_ns: u64) -> Self {
        Self { budget_ns, history: u32::MAX, skipped: 0 }
    }

    /// How long to look before the sleep that comes now: 0 where looking has not paid of late.
    pub fn budget_ns(&mut self) -> u64 {
        if self.budget_ns == 0 || self.history.count_ones() >= MIN_HITS {
            return self.budget_ns;
        }
        self.skipped += 1;
        if self.skipped < PROBE_EVERY {
            return 0;
        }
        self.skipped = 0;
        self.budget_ns
    }

    /// Tells whether the look found something.
    pub fn record(&mut self, found: bool) {
        self.history = (self.history << 1) | u32::from(found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stops_looking_when_nothing_comes_and_tries_again_later() {
        let mut s = Spinner::new(1000);
        let mut looked = 0;
        for _ in 0..10_000 {
            if s.budget_ns() > 0 {
                looked += 1;
                s.record(false);
            }
        }
        assert!(looked < 32 + 10_000 / PROBE_EVERY + 2, "looked {looked} times");
        for _ in 0..MIN_HITS {
            while s.budget_ns() == 0 {}
            s.record(true);
        }
        assert_eq!(s.budget_ns(), 1000);
    }

    #[test]
    fn no_budget_never_looks() {
        assert_eq!(Spinner::new(0).budget_ns(), 0);
    }
}

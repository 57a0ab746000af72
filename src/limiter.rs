//! Rate limiters: token buckets for bytes and for operations, as the API describes them.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize, Serializer};

use crate::error::{self, Error};
use crate::snapshot::Snapshot;

/// A bucket of `size` tokens that is refilled in `refill_time` milliseconds. It is no limit if either is 0.
/// Fields that it does not have are ignored, as Firecracker ignores them here.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "TokenBucket"))]
#[serde(expecting = "struct TokenBucketConfig")]
pub struct TokenBucket {
    /// How many tokens the bucket holds.
    pub size: u64,
    /// Tokens beyond `size` that are there once, at the beginning, and are not refilled.
    pub one_time_burst: Option<u64>,
    /// The time in which an empty bucket is full again, in milliseconds.
    pub refill_time: u64,
}

/// The limits of a device, or of one direction of a network interface.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "RateLimiter"))]
#[serde(deny_unknown_fields, expecting = "struct RateLimiterConfig")]
pub struct RateLimiter {
    /// Tokens are bytes.
    #[serde(serialize_with = "tell")]
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are requests or frames.
    #[serde(serialize_with = "tell")]
    pub ops: Option<TokenBucket>,
}

/// Writes a bucket as the API tells it: a bucket that is no limit is told as null.
fn tell<S: Serializer>(bucket: &Option<TokenBucket>, serializer: S) -> Result<S::Ok, S::Error> {
    bucket.filter(TokenBucket::is_limit).serialize(serializer)
}

impl TokenBucket {
    fn is_limit(&self) -> bool {
        self.size > 0 && self.refill_time > 0
    }
}

impl RateLimiter {
    /// These limits as changed by `patch`: a bucket that `patch` leaves out stays, one with a 0 is no limit.
    pub fn patched(self, patch: Self) -> Self {
        Self { bandwidth: patch.bandwidth.or(self.bandwidth), ops: patch.ops.or(self.ops) }
    }
}

/// A bucket in use.
#[derive(Clone, Debug)]
struct Bucket {
    size: u64,
    refill: Duration,
    /// The number of tokens. It is negative after an operation that was larger than the bucket: nothing is
    /// let through before the debt is refilled.
    tokens: i128,
    burst: u64,
    /// The time up to which `tokens` is computed.
    filled: Instant,
}

impl Bucket {
    fn new(config: TokenBucket, now: Instant) -> Option<Self> {
        let TokenBucket { size, one_time_burst, refill_time } = config;
        config.is_limit().then(|| Self {
            size,
            refill: Duration::from_millis(refill_time),
            tokens: size.into(),
            burst: one_time_burst.unwrap_or(0),
            filled: now,
        })
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled);
        let new = passed.as_nanos().saturating_mul(self.size.into()) / self.refill.as_nanos();
        if new > 0 {
            self.tokens = self.tokens.saturating_add_unsigned(new).min(self.size.into());
            // The part of `passed` that does not make a whole token counts next time.
            let used = new.saturating_mul(self.refill.as_nanos()).div_ceil(self.size.into());
            let used = Duration::from_nanos(u64::try_from(used).unwrap_or(u64::MAX));
            self.filled = self.filled.checked_add(used).unwrap_or(now).min(now);
        }
    }

    /// How long it takes until `count` tokens can be taken; None if they can be taken now. A count larger
    /// than the bucket is taken when the bucket is full, and leaves a debt: it could never be taken otherwise.
    fn wait(&self, count: u64) -> Option<Duration> {
        let missing = i128::from(count.saturating_sub(self.burst).min(self.size)) - self.tokens;
        if missing <= 0 {
            return None;
        }
        let nanos = missing.unsigned_abs().saturating_mul(self.refill.as_nanos()).div_ceil(self.size.into());
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, count: u64) {
        let from_burst = count.min(self.burst);
        self.burst -= from_burst;
        self.tokens -= i128::from(count - from_burst);
    }

    /// No more than the bucket holds, and nothing to the burst: a guest that has operations undone again and
    /// again would have its burst as often.
    fn put_back(&mut self, count: u64) {
        self.tokens = (self.tokens + i128::from(count)).min(self.size.into());
    }
}

/// Limits in use. Where no limit is set, asking costs neither a system call nor a look at the clock.
#[derive(Clone, Debug, Default)]
pub struct Limiter {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

impl Limiter {
    /// A limiter with full buckets.
    pub fn new(config: RateLimiter) -> Self {
        let now = Instant::now();
        let bucket = |config: Option<TokenBucket>| config.and_then(|config| Bucket::new(config, now));
        Self { bandwidth: bucket(config.bandwidth), ops: bucket(config.ops) }
    }

    /// Replaces the buckets that `patch` names by full ones.
    pub fn patch(&mut self, patch: RateLimiter) {
        let Self { bandwidth, ops } = Self::new(patch);
        if patch.bandwidth.is_some() {
            self.bandwidth = bandwidth;
        }
        if patch.ops.is_some() {
            self.ops = ops;
        }
    }

    /// Whether any limit is set.
    pub fn is_limited(&self) -> bool {
        self.bandwidth.is_some() || self.ops.is_some()
    }

    /// Takes the tokens of one operation of `bytes` bytes, or says how long it has to wait for them.
    pub fn take(&mut self, bytes: u64) -> Result<(), Duration> {
        if !self.is_limited() {
            return Ok(());
        }
        self.take_at(bytes, Instant::now())
    }

    /// One operation of `bytes` bytes is done, whatever the limits say: what is missing is owed.
    pub fn owe(&mut self, bytes: u64) {
        for (bucket, count) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(count);
            }
        }
    }

    /// One operation of `bytes` bytes that was let through is not done: it will ask again.
    pub fn refund(&mut self, bytes: u64) {
        for (bucket, count) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.put_back(count);
            }
        }
    }

    /// How long until nothing is owed any more; none: nothing is.
    pub fn debt(&mut self) -> Option<Duration> {
        if !self.is_limited() {
            return None;
        }
        self.debt_at(Instant::now())
    }

    fn debt_at(&mut self, now: Instant) -> Option<Duration> {
        let buckets = [&mut self.bandwidth, &mut self.ops].into_iter().flatten();
        let waits = buckets.filter_map(|bucket| {
            bucket.fill(now);
            bucket.wait(0)
        });
        waits.max()
    }

    fn take_at(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut buckets = [(&mut self.bandwidth, bytes), (&mut self.ops, 1)];
        let mut wait = None;
        for (bucket, count) in &mut buckets {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                wait = wait.max(bucket.wait(*count));
            }
        }
        if let Some(wait) = wait {
            return Err(wait);
        }
        for (bucket, count) in buckets {
            if let Some(bucket) = bucket {
                bucket.take(count);
            }
        }
        Ok(())
    }
}

/// What is in a bucket.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
struct Tokens {
    tokens: i128,
    burst: u64,
}

impl Tokens {
    /// A bucket that owes more than this owes this much: waits are computed from the debt.
    const OWED_MAX: i128 = u64::MAX as i128;
}

/// What is in the buckets of a limiter, where they are limits.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    bandwidth: Option<Tokens>,
    ops: Option<Tokens>,
}

/// A guest that is saved and restored gets no full buckets by that. The time in between does not fill them.
impl Snapshot for Limiter {
    type State = State;

    fn save(&self) -> error::Result<State> {
        let now = Instant::now();
        let tokens = |bucket: &Option<Bucket>| {
            bucket.clone().map(|mut bucket| {
                bucket.fill(now);
                Tokens { tokens: bucket.tokens, burst: bucket.burst }
            })
        };
        Ok(State { bandwidth: tokens(&self.bandwidth), ops: tokens(&self.ops) })
    }

    fn restore(&mut self, state: State) -> error::Result<()> {
        for (bucket, saved) in [(&mut self.bandwidth, state.bandwidth), (&mut self.ops, state.ops)] {
            match (bucket, saved) {
                (None, None) => {}
                (Some(bucket), Some(saved))
                    if saved.tokens <= bucket.size.into() && saved.burst <= bucket.burst =>
                {
                    bucket.tokens = saved.tokens.max(-Tokens::OWED_MAX);
                    (bucket.burst, bucket.filled) = (saved.burst, Instant::now());
                }
                _ => return Err(Error::config("the saved state is of other rate limits")),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn limiter(bandwidth: (u64, u64), ops: Option<(u64, u64)>, burst: Option<u64>) -> (Limiter, Instant) {
        let bucket = |(size, refill_time)| TokenBucket { size, one_time_burst: burst, refill_time };
        let config = RateLimiter { bandwidth: Some(bucket(bandwidth)), ops: ops.map(bucket) };
        let limiter = Limiter::new(config);
        let filled = limiter.bandwidth.as_ref().map_or_else(Instant::now, |bucket| bucket.filled);
        (limiter, filled)
    }

    #[test]
    fn what_the_bucket_holds_goes_at_once_and_then_at_the_rate() {
        let (mut limiter, start) = limiter((1000, 100), None, None);
        assert_eq!(limiter.take_at(600, start), Ok(()));
        assert_eq!(limiter.take_at(400, start), Ok(()));
        assert_eq!(limiter.take_at(10, start), Err(MS));
        assert_eq!(limiter.take_at(10, start + MS), Ok(()));
        assert_eq!(limiter.take_at(1000, start + 101 * MS), Ok(()), "full again, and not more than full");
        assert_eq!(limiter.take_at(1, start + 101 * MS), Err(MS / 10));
    }

    #[test]
    fn more_than_the_bucket_holds_goes_when_it_is_full_and_is_paid_back() {
        let (mut limiter, start) = limiter((1000, 100), None, None);
        assert_eq!(limiter.take_at(3000, start), Ok(()));
        assert_eq!(limiter.take_at(1, start + 200 * MS), Err(MS / 10));
        assert_eq!(limiter.take_at(1, start + 201 * MS), Ok(()));
    }

    #[test]
    fn what_is_owed_is_paid_back_before_anything_goes() {
        let (mut limiter, start) = limiter((1000, 100), Some((10, 100)), None);
        limiter.owe(900);
        assert_eq!(limiter.debt_at(start), None);
        limiter.owe(200);
        assert_eq!(limiter.debt_at(start), Some(10 * MS));
        (0..10).for_each(|_| limiter.owe(0));
        assert_eq!(limiter.debt_at(start), Some(20 * MS), "two operations more than there are");
        assert_eq!(limiter.take_at(0, start), Err(30 * MS));
        assert_eq!(limiter.debt_at(start + 20 * MS), None);
        assert_eq!(Limiter::default().debt(), None);
    }

    #[test]
    fn what_is_undone_can_be_taken_again_and_no_more() {
        let (mut limiter, start) = limiter((1000, 100), Some((2, 100)), Some(100));
        assert_eq!(limiter.take_at(1100, start), Ok(()));
        limiter.refund(1100);
        assert_eq!(limiter.take_at(1000, start), Ok(()), "what the bucket holds, and the burst is used up");
        assert_eq!(limiter.take_at(1, start + MS), Ok(()), "of operations the burst is left");
        assert_eq!(limiter.take_at(10, start + MS), Err(MS / 10));
        (0..5).for_each(|_| limiter.refund(u64::MAX));
        assert_eq!(limiter.take_at(1000, start + MS), Ok(()));
        assert!(limiter.take_at(1, start + MS).is_err(), "more than full");
        Limiter::default().refund(1);
    }

    #[test]
    fn a_burst_is_there_once() {
        let (mut limiter, start) = limiter((10, 100), None, Some(100));
        assert_eq!(limiter.take_at(110, start), Ok(()));
        assert_eq!(limiter.take_at(10, start), Err(100 * MS));
        assert_eq!(limiter.take_at(10, start + 1000 * MS), Ok(()));
        assert!(limiter.take_at(1, start + 1000 * MS).is_err());
    }

    #[test]
    fn the_tighter_bucket_decides_and_a_refusal_takes_nothing() {
        let (mut limiter, start) = limiter((1000, 100), Some((2, 100)), None);
        assert_eq!(limiter.take_at(1, start), Ok(()));
        assert_eq!(limiter.take_at(1, start), Ok(()));
        for _ in 0..5 {
            assert_eq!(limiter.take_at(500, start), Err(50 * MS));
        }
        assert_eq!(limiter.take_at(998, start + 50 * MS), Ok(()));
    }

    #[test]
    fn a_bucket_of_nothing_is_no_limit_and_large_numbers_are_just_large() {
        for (size, refill) in [(0, 100), (100, 0)] {
            assert!(!limiter((size, refill), None, None).0.is_limited());
        }
        let (mut limiter, start) = limiter((u64::MAX, u64::MAX), None, Some(u64::MAX));
        for _ in 0..4 {
            let _ = limiter.take_at(u64::MAX, start + Duration::from_secs(1 << 40));
        }
    }

    #[test]
    fn limits_at_work_keep_what_a_patch_does_not_name() {
        let (mut limiter, start) = limiter((1000, 100), Some((2, 100)), None);
        assert_eq!(limiter.take_at(1000, start), Ok(()));
        let none = Some(TokenBucket { size: 0, one_time_burst: None, refill_time: 0 });
        limiter.patch(RateLimiter { bandwidth: None, ops: none });
        assert_eq!(limiter.take_at(1000, start), Err(100 * MS), "the bandwidth is as used as it was");
        limiter.patch(RateLimiter { bandwidth: none, ops: None });
        assert!(!limiter.is_limited());
    }

    #[test]
    fn restored_limits_have_what_was_left_in_the_buckets() {
        const LONG: u64 = 1 << 40;
        let new = || limiter((1000, LONG), Some((2, LONG)), Some(100)).0;
        let (mut old, mut other) = (new(), new());
        old.take(1050).unwrap();
        (0..101).for_each(|_| old.owe(0));
        let state = old.save().unwrap();
        other.restore(state).unwrap();
        assert_eq!(other.save().unwrap(), state);
        assert!(other.take(1).is_err(), "both operations are used up");
        assert!(new().take(1).is_ok());

        let refused = |limiter: &mut Limiter, state| {
            let error = limiter.restore(state).unwrap_err().to_string();
            assert!(error.contains("of other rate limits"), "{error}");
        };
        let tokens = |tokens, burst| State { bandwidth: Some(Tokens { tokens, burst }), ..state };
        refused(&mut Limiter::default(), state);
        refused(&mut new(), State { ops: None, ..state });
        refused(&mut new(), tokens(1001, 0));
        refused(&mut new(), tokens(0, 101));
        let mut poor = new();
        poor.restore(tokens(i128::MIN, 0)).unwrap();
        assert!(poor.take(u64::MAX).is_err() && poor.debt().is_some());
    }

    #[test]
    fn a_patch_changes_the_buckets_it_names() {
        let bucket = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 1 });
        let old = RateLimiter { bandwidth: bucket(1), ops: bucket(2) };
        let patched = old.patched(RateLimiter { bandwidth: None, ops: bucket(0) });
        assert_eq!(patched, RateLimiter { bandwidth: bucket(1), ops: bucket(0) });
    }
}

//! What the scheduler promises, one promise a test.

mod batching;
mod blocks;
mod ends;
mod fairness;
mod harness;
mod speculation;

//! Payloads as engines send them, and damaged ones. What Python reads of the same bytes is compared in
//! `tests/property/test_native_decode.py`.

mod arrays;
mod extras;
mod maps;
mod refused;
mod value;

use super::{Unusual, Wire, decode};
use crate::events::{Batch, Event, Removed, Stored};
use value::Value;

fn read(wire: Wire, payload: &[u8]) -> Result<Batch, Unusual> {
    let mut batch = Batch::default();
    decode(payload, wire, &mut batch).map(|()| batch)
}

/// A payload with these events.
fn payload(events: Vec<Value>) -> Vec<u8> {
    Value::Array(vec![Value::Float(1.5), Value::Array(events), 1.into()]).packed()
}

fn read_events(wire: Wire, events: Vec<Value>) -> Result<Batch, Unusual> {
    read(wire, &payload(events))
}

/// The batch of one event that is a store, and that event.
fn stored(wire: Wire, event: Value) -> (Batch, Stored) {
    let batch = read_events(wire, vec![event]).unwrap();
    let [Event::Stored(stored)] = &batch.events[..] else { panic!("{:?}", batch.events) };
    let stored = stored.clone();
    (batch, stored)
}

fn removed(wire: Wire, event: Value) -> (Batch, Removed) {
    let batch = read_events(wire, vec![event]).unwrap();
    let [Event::Removed(removed)] = &batch.events[..] else { panic!("{:?}", batch.events) };
    let removed = removed.clone();
    (batch, removed)
}

//! Frames over a connection, and their authentication.
//!
//! ```text
//! frame    "LHND" | kind u8 | 3 zero bytes | length u32 | payload | tag (32 bytes, not before the keys are known)
//! tag      HMAC-SHA256(session key, direction u8 | number u64 | header | payload)
//! session  HMAC-SHA256(shared key, "longhaul nodes" | worker's nonce | leader's nonce)
//! ```
//! Integers are little-endian. Numbers count the frames of a direction, so none can be repeated, dropped or reordered.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::NodesError;

type Result<T> = std::result::Result<T, NodesError>;

/// Bytes of a payload at most.
pub const MOST_BYTES: usize = 64 << 20;
/// Bytes of a payload at most before the other side is known.
pub const MOST_BYTES_OF_STRANGERS: usize = 4096;

const MAGIC: [u8; 4] = *b"LHND";
const HEADER_BYTES: usize = 12;
const TAG_BYTES: usize = 32;
pub const NONCE_BYTES: usize = 32;

/// What a frame is.
pub mod kind {
    pub const HELLO: u8 = 1;
    pub const CHALLENGE: u8 = 2;
    pub const REFUSAL: u8 = 3;
    pub const CONTROL: u8 = 4;
    pub const DATA: u8 = 5;
    /// Nothing to say, but alive.
    pub const BEAT: u8 = 6;
}

/// The secret that all nodes share.
#[derive(Clone)]
pub struct Key(Vec<u8>);

impl Key {
    /// Bytes at least.
    pub const LEAST_BYTES: usize = 16;

    /// A key; surrounding white space, as an editor leaves it, does not count.
    ///
    /// # Errors
    /// [`NodesError::WeakKey`].
    pub fn new(bytes: &[u8]) -> Result<Self> {
        let bytes = bytes.trim_ascii();
        if bytes.len() < Self::LEAST_BYTES {
            return Err(NodesError::WeakKey { bytes: bytes.len(), least: Self::LEAST_BYTES });
        }
        Ok(Self(bytes.into()))
    }

    /// The key of a connection.
    pub(crate) fn session(&self, worker: &[u8], leader: &[u8]) -> [u8; 32] {
        let mut mac = mac(&self.0);
        mac.update(b"longhaul nodes");
        mac.update(worker);
        mac.update(leader);
        mac.finalize().into_bytes().into()
    }
}

fn mac(key: &[u8]) -> Hmac<Sha256> {
    // A key of any length is fitting.
    <Hmac<Sha256> as Mac>::new_from_slice(key)
        .unwrap_or_else(|_| unreachable!("HMAC takes keys of any length"))
}

/// Random bytes that were never used before.
pub fn nonce() -> Result<[u8; NONCE_BYTES]> {
    let mut bytes = [0; NONCE_BYTES];
    getrandom::fill(&mut bytes)
        .map_err(|e| NodesError::System { what: "random numbers".into(), source: io::Error::other(e) })?;
    Ok(bytes)
}

/// Which end of a connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Leader = 0,
    Worker = 1,
}

/// A connection between leader and worker.
pub struct Channel {
    stream: TcpStream,
    peer: String,
    side: Side,
    session: Option<[u8; 32]>,
    sent: u64,
    received: u64,
}

impl Channel {
    pub(crate) fn new(stream: TcpStream, side: Side) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let peer = stream.peer_addr()?.to_string();
        Ok(Self { stream, peer, side, session: None, sent: 0, received: 0 })
    }

    pub(crate) fn set_session(&mut self, key: [u8; 32]) {
        self.session = Some(key);
    }

    pub(crate) fn set_peer(&mut self, peer: String) {
        self.peer = peer;
    }

    /// The same connection twice: one end to send with, the other to receive with.
    pub(crate) fn split(self) -> io::Result<(Self, Self)> {
        let stream = self.stream.try_clone()?;
        let sending = Self { stream, peer: self.peer.clone(), ..self };
        Ok((sending, self))
    }

    /// Ends the connection for both ends; whoever reads or writes returns.
    pub(crate) fn shutdown(&self) {
        // It may have ended already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Who is at the other end, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Sends bytes to the other side.
    ///
    /// # Errors
    /// [`NodesError::Lost`] when it does not take them within `timeout`, [`NodesError::Malformed`] beyond [`MOST_BYTES`].
    pub fn send(&mut self, bytes: &[u8], timeout: Duration) -> Result<()> {
        self.send_frame(kind::DATA, bytes, Instant::now() + timeout)
    }

    /// Receives what the other side sent, at most `most` bytes.
    ///
    /// # Errors
    /// [`NodesError::Lost`] when it ended or sent nothing whole within `timeout`, [`NodesError::Malformed`].
    pub fn receive(&mut self, most: usize, timeout: Duration) -> Result<Vec<u8>> {
        let (kind, bytes) = self.receive_frame(most.min(MOST_BYTES), Instant::now() + timeout)?;
        if kind != kind::DATA {
            return Err(self.malformed(format!("a frame of kind {kind}, not data")));
        }
        Ok(bytes)
    }

    /// Whether the other side still holds the connection, as far as this one can see without waiting.
    pub fn is_open(&self) -> bool {
        if self.stream.set_nonblocking(true).is_err() {
            return false;
        }
        let open = match self.stream.peek(&mut [0]) {
            Ok(bytes) => bytes != 0,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        self.stream.set_nonblocking(false).is_ok() && open
    }

    /// What [`Self::is_open`] found.
    pub(crate) fn closed(&self) -> NodesError {
        self.lost(&io::ErrorKind::UnexpectedEof.into())
    }

    pub(crate) fn malformed(&self, message: impl Into<String>) -> NodesError {
        NodesError::Malformed { peer: self.peer.clone(), message: message.into() }
    }

    fn lost(&self, error: &io::Error) -> NodesError {
        let message = match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                "it closed the connection".into()
            }
            _ if is_timeout(error) => "it was silent until the deadline".into(),
            _ => error.to_string(),
        };
        NodesError::Lost { peer: self.peer.clone(), message }
    }

    fn tag(
        &self,
        session: &[u8; 32],
        from: Side,
        number: u64,
        header: &[u8],
        payload: &[u8],
    ) -> Hmac<Sha256> {
        let mut mac = mac(session);
        mac.update(&[from as u8]);
        mac.update(&number.to_le_bytes());
        mac.update(header);
        mac.update(payload);
        mac
    }

    pub(crate) fn send_frame(&mut self, kind: u8, payload: &[u8], deadline: Instant) -> Result<()> {
        let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= MOST_BYTES);
        let Some(length) = length else {
            return Err(NodesError::Malformed {
                peer: "this process".into(),
                message: format!("{} bytes at once; at most {MOST_BYTES} are possible", payload.len()),
            });
        };
        let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len() + TAG_BYTES);
        frame.extend(MAGIC);
        frame.extend([kind, 0, 0, 0]);
        frame.extend(length.to_le_bytes());
        frame.extend(payload);
        if let Some(session) = &self.session {
            let tag = self.tag(session, self.side, self.sent, &frame[..HEADER_BYTES], payload);
            frame.extend(tag.finalize().into_bytes());
            self.sent += 1;
        }
        let mut rest = &frame[..];
        while !rest.is_empty() {
            let wrote = remaining(deadline)
                .and_then(|left| self.stream.set_write_timeout(Some(left)))
                .and_then(|()| self.stream.write(rest));
            match wrote {
                Ok(0) => return Err(self.lost(&io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.lost(&e)),
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8], patience: &mut Patience) -> Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            let read = patience
                .slice()
                .and_then(|slice| self.stream.set_read_timeout(Some(slice)))
                .and_then(|()| self.stream.read(buffer.get_mut(filled..).unwrap_or_default()));
            match read {
                Ok(0) => return Err(self.lost(&io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => {
                    filled += n;
                    patience.heard();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_timeout(&e) && patience.lasts() => {}
                Err(e) => return Err(self.lost(&e)),
            }
        }
        Ok(())
    }

    /// The next frame. A wrong tag is [`NodesError::Key`].
    pub(crate) fn receive_frame(&mut self, most: usize, deadline: Instant) -> Result<(u8, Vec<u8>)> {
        self.receive_patiently(most, &mut Patience::Until(deadline))
    }

    /// [`Self::receive_frame`] for as long as `patience` lasts.
    pub(crate) fn receive_patiently(
        &mut self,
        most: usize,
        patience: &mut Patience,
    ) -> Result<(u8, Vec<u8>)> {
        let mut header = [0; HEADER_BYTES];
        self.read(&mut header, patience)?;
        let [m0, m1, m2, m3, kind, z0, z1, z2, l0, l1, l2, l3] = header;
        if [m0, m1, m2, m3] != MAGIC || [z0, z1, z2] != [0; 3] {
            return Err(self.malformed("something that is not a frame"));
        }
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > most {
            return Err(self.malformed(format!("a frame of {length} bytes; at most {most} are expected")));
        }
        let mut payload = vec![0; length];
        self.read(&mut payload, patience)?;
        // A refusal can be said to somebody without the key, or with another protocol.
        if let Some(session) = self.session.filter(|_| kind != kind::REFUSAL) {
            let mut tag = [0; TAG_BYTES];
            self.read(&mut tag, patience)?;
            let from = if self.side == Side::Leader { Side::Worker } else { Side::Leader };
            if self.tag(&session, from, self.received, &header, &payload).verify_slice(&tag).is_err() {
                return Err(NodesError::Key { peer: self.peer.clone() });
            }
            self.received += 1;
        }
        Ok((kind, payload))
    }

    /// A frame without a tag.
    pub(crate) fn send_refusal(&mut self, payload: &[u8], deadline: Instant) -> Result<()> {
        self.session = None;
        self.send_frame(kind::REFUSAL, payload, deadline)
    }
}

/// How long a reader waits.
pub(crate) enum Patience {
    /// Until then, whatever comes.
    Until(Instant),
    /// While something comes: the silence allowed, and that so far, counted in slices of waiting. So a process that was
    /// stopped itself, and finds on going on that much time has passed, does not blame the other side.
    Silence { allowed: Duration, so_far: Duration },
}

impl Patience {
    /// Longest wait at once.
    const SLICE: Duration = Duration::from_millis(100);

    pub(crate) fn silence(allowed: Duration) -> Self {
        Patience::Silence { allowed, so_far: Duration::ZERO }
    }

    /// The next wait.
    fn slice(&self) -> io::Result<Duration> {
        match self {
            Patience::Until(deadline) => remaining(*deadline),
            Patience::Silence { .. } => Ok(Self::SLICE),
        }
    }

    fn heard(&mut self) {
        if let Patience::Silence { so_far, .. } = self {
            *so_far = Duration::ZERO;
        }
    }

    /// Whether to wait on after a slice in which nothing came.
    fn lasts(&mut self) -> bool {
        match self {
            Patience::Until(_) => false,
            Patience::Silence { allowed, so_far } => {
                *so_far += Self::SLICE;
                so_far < allowed
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}

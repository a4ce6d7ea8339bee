//! A client that costs little: prepared requests over connections that are kept, answers that are scanned, not parsed.

use std::io;
use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A completion request.
pub fn request(body: &Value) -> Vec<u8> {
    request_to("/v1/completions", body)
}

/// A request to `path`.
pub fn request_to(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// The head of an answer.
pub struct Head {
    pub status: u16,
    pub has_retry_after: bool,
    length: Option<usize>,
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

impl Connection {
    pub async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(4096) })
    }

    async fn more(&mut self) -> io::Result<()> {
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(broken("the connection ended")),
            _ => Ok(()),
        }
    }

    /// Sends a request; the head of its answer.
    pub async fn send(&mut self, request: &[u8]) -> io::Result<Head> {
        self.stream.write_all(request).await?;
        let end = loop {
            match find(&self.buffer, b"\r\n\r\n") {
                Some(end) => break end,
                None => self.more().await?,
            }
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
        self.buffer.drain(..end + 4);
        let status = head.get(9..12).and_then(|status| status.parse().ok());
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        Ok(Head {
            status: status.ok_or_else(|| broken("no status"))?,
            has_retry_after: head.contains("\r\nretry-after: "),
            length,
        })
    }

    /// Reads a body whose length was declared.
    pub async fn body(&mut self, head: &Head) -> io::Result<()> {
        let length = head.length.ok_or_else(|| broken("no length"))?;
        while self.buffer.len() < length {
            self.more().await?;
        }
        self.buffer.drain(..length);
        Ok(())
    }

    /// The token ids of the events that have come, at least one; none at the end of the stream.
    pub async fn tokens(&mut self, mut take: impl FnMut(u32)) -> io::Result<bool> {
        const NAME: &[u8] = b"\"token_ids\":[";
        self.more().await?;
        let mut at = 0;
        while let Some(found) = find(&self.buffer[at..], NAME) {
            let digits = &self.buffer[at + found + NAME.len()..];
            let Some(end) = digits.iter().position(|byte| !byte.is_ascii_digit()) else { break };
            let id = digits[..end].iter().fold(0, |id, digit| id * 10 + u32::from(digit - b'0'));
            if end > 0 {
                take(id);
            }
            at += found + NAME.len() + end;
        }
        let is_over = find(&self.buffer[at..], b"[DONE]").is_some();
        // What is left may be the beginning of an event.
        let keep = self.buffer.len().saturating_sub(512).max(at);
        self.buffer.drain(..keep);
        Ok(!is_over)
    }
}

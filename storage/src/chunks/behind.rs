//! A full buffer is written by a thread of its own while the next one is filled.

use super::direct::BLOCK;
use crate::disk::DiskFile;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Bytes gathered before they are written. Small in tests, so that they fill some.
const LEN: usize = if cfg!(test) { 256 << 10 } else { 8 << 20 };

/// Bytes that are to follow each other in a file, aligned for a direct write.
pub(super) struct Buffer {
    /// Over-allocated; the aligned part starts at `start` and is never moved.
    memory: Vec<u8>,
    start: usize,
    filled: usize,
    /// Where in the file they go: a multiple of [`BLOCK`].
    offset: u64,
}

impl Buffer {
    pub(super) fn at(offset: u64) -> Self {
        let memory = vec![0; LEN + BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Self {
            memory,
            start,
            filled: 0,
            offset,
        }
    }

    /// Empty it, for bytes that go elsewhere.
    pub(super) fn restart(&mut self, offset: u64) {
        self.filled = 0;
        self.offset = offset;
    }

    /// Take as many of these as there is room for; how many.
    pub(super) fn take(&mut self, bytes: &[u8]) -> usize {
        let take = bytes.len().min(LEN - self.filled);
        let at = self.start + self.filled;
        self.memory[at..at + take].copy_from_slice(&bytes[..take]);
        self.filled += take;
        take
    }

    pub(super) fn is_full(&self) -> bool {
        self.filled == LEN
    }

    /// Where in the file its end goes.
    pub(super) fn end(&self) -> u64 {
        self.offset + self.filled as u64
    }

    pub(super) fn write_to(&self, file: &dyn DiskFile) -> io::Result<()> {
        let bytes = &self.memory[self.start..self.start + self.filled];
        file.write_all_at(bytes, self.offset)
    }
}

/// The thread; it ends when this goes, after what it was given.
pub(super) struct Behind {
    jobs: SyncSender<(Arc<dyn DiskFile>, Buffer)>,
    done: Receiver<(Buffer, io::Result<()>)>,
    under_way: bool,
}

impl Behind {
    pub(super) fn start() -> io::Result<Self> {
        let (jobs, todo) = sync_channel::<(Arc<dyn DiskFile>, Buffer)>(1);
        let (ended, done) = sync_channel(1);
        std::thread::Builder::new()
            .name("chunk-behind".to_owned())
            .spawn(move || {
                for (file, buffer) in todo {
                    let written = buffer.write_to(&*file);
                    if ended.send((buffer, written)).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            jobs,
            done,
            under_way: false,
        })
    }

    /// Write this one; the one before has been waited for. It comes back if there is no thread any more.
    pub(super) fn write(&mut self, file: Arc<dyn DiskFile>, buffer: Buffer) -> Result<(), Buffer> {
        match self.jobs.send((file, buffer)) {
            Ok(()) => {
                self.under_way = true;
                Ok(())
            }
            Err(back) => Err(back.0.1),
        }
    }

    /// The buffer that is being written, when it was; `None`: none is.
    pub(super) fn wait(&mut self) -> Option<io::Result<(Buffer, io::Result<()>)>> {
        if !std::mem::take(&mut self.under_way) {
            return None;
        }
        let gone = |_| io::Error::other("the thread that writes ended by itself");
        Some(self.done.recv().map_err(gone))
    }
}

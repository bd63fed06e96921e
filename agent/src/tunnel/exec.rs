//! A program in a guest at the end of a tunnel.

use super::{Inner, refuse};
use crate::driver::{Exec, ExecError};
use crate::tunnel::frame::{self, ALIVE_EVERY, Kind};
use crate::wire::{ExecCommand, ExecEnd};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::sleep;

/// Most bytes of a program's standard input: they travel in one request to the guest.
const INPUT_MAX: usize = 1 << 20;

impl Inner {
    /// Runs one program and tells its end.
    pub(super) async fn exec<R, W>(&self, id: &str, from: &mut R, to: &mut W) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let Ok(_place) = self.execs.try_acquire() else {
            let why = "too many programs run on this node through tunnels: try again later";
            return refuse(to, why.to_owned(), false).await;
        };
        frame::write(to, Kind::Ready, b"").await?;
        let asked = {
            let asked = command(from);
            tokio::pin!(asked);
            // Until its input has come, which may take a person's time.
            loop {
                tokio::select! {
                    asked = &mut asked => break asked?,
                    () = sleep(ALIVE_EVERY) => frame::write(to, Kind::Alive, b"").await?,
                }
            }
        };
        let exec = match asked {
            Ok(exec) => exec,
            Err(why) => return refuse(to, why, false).await,
        };
        let (hold, dropped) = oneshot::channel::<()>();
        let give_up = Box::pin(async move {
            dropped.await.ok();
        });
        let done = {
            let run = self.driver.exec(id, &exec, give_up);
            let gone = async { while frame::next(from).await.is_ok() {} };
            tokio::pin!(run, gone);
            loop {
                let reached = tokio::select! {
                    done = &mut run => break done,
                    () = &mut gone => false,
                    () = sleep(ALIVE_EVERY) => frame::write(to, Kind::Alive, b"").await.is_ok(),
                };
                if !reached {
                    // Nobody is left to tell; the driver ends the program.
                    drop(hold);
                    run.await.ok();
                    return Ok(());
                }
            }
        };
        match done {
            Ok(done) => {
                frame::write_all(to, Kind::Data, &done.stdout).await?;
                frame::write_all(to, Kind::Stderr, &done.stderr).await?;
                let end = ExecEnd {
                    code: done.code,
                    did_timeout: done.did_timeout,
                    truncated: done.truncated,
                };
                frame::write_json(to, Kind::Exit, &end).await
            }
            Err(ExecError::NotRun(why)) => refuse(to, why, false).await,
            Err(ExecError::Unknown(why)) => refuse(to, why, true).await,
        }
    }
}

/// What is to be run, with all of its input; the inner error is a sentence.
async fn command<R: AsyncRead + Unpin>(from: &mut R) -> io::Result<Result<Exec, String>> {
    let first = frame::next(from).await?;
    if first.kind != Kind::Run {
        return Ok(Err(format!("{:?} before Run", first.kind)));
    }
    let asked: ExecCommand = match serde_json::from_slice(&first.body) {
        Ok(asked) => asked,
        Err(e) => return Ok(Err(e.to_string())),
    };
    if asked.argv.first().is_none_or(String::is_empty) {
        return Ok(Err("there is no program to run".to_owned()));
    }
    if asked.argv.iter().any(|word| word.contains('\0')) {
        return Ok(Err("an argument has a zero byte".to_owned()));
    }
    let mut exec = Exec {
        argv: asked.argv,
        input: Vec::new(),
        within: (asked.timeout_s > 0).then(|| Duration::from_secs(asked.timeout_s.into())),
    };
    loop {
        let frame = frame::next(from).await?;
        match frame.kind {
            Kind::Data if exec.input.len() + frame.body.len() > INPUT_MAX => {
                return Ok(Err(format!(
                    "standard input is longer than {INPUT_MAX} bytes"
                )));
            }
            Kind::Data => exec.input.extend_from_slice(&frame.body),
            Kind::End => return Ok(Ok(exec)),
            other => return Ok(Err(format!("{other:?} in standard input"))),
        }
    }
}

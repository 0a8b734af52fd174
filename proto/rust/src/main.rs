//! Writes Rust code of a FileDescriptorSet (standard input) into a folder (the only argument), one file for each package.

use prost::Message;
use prost_types::FileDescriptorSet;
use std::error::Error;
use std::io::{Read, stdin};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("name the folder to write into")?;
    let mut bytes = Vec::new();
    stdin().read_to_end(&mut bytes)?;
    let contracts = FileDescriptorSet::decode(bytes.as_slice())?;
    prost_build::Config::new().bytes(["."]).out_dir(folder).include_file("mod.rs").compile_fds(contracts)?;
    Ok(())
}

// Read one array of a heatmap store, written from docs/cache-layout.md alone, for Node 18 or later, without packages:
//
//     node tests/read_store.mjs CACHE.zarr ARRAY > FILE
//
// It writes the values in little-endian rows: heatmaps as float32, decoded and multiplied by their scale, other arrays as
// they are stored. zstd needs a Node that has it (22.15, 23.8 or later). It is an example in another language and not fast.

import { existsSync, readFileSync } from "node:fs";
import * as zlib from "node:zlib";

const [folder, name] = process.argv.slice(2);
const { attributes } = JSON.parse(readFileSync(`${folder}/zarr.json`));
if (attributes?.kind !== "explanation-distillation cache" || attributes.format_version !== 3) throw Error("no store");
const { explainer, teacher, dataset, storage } = attributes;
const shardSamples = storage.shard_samples;
const chunks = shardSamples / storage.chunk_samples;
const shards = Math.ceil(dataset.samples / shardSamples);
const [channels, height, width] = explainer.map_shape;
const mapSize = channels * Math.floor(height / storage.resolution) * Math.floor(width / storage.resolution);
const widths = { scale: explainer.draws, target_class: explainer.draws, epsilon: explainer.draws };
widths.teacher_logits = teacher.class_names.length;
if (storage.features) widths.features = storage.features;
const rows = Object.keys(widths); // in the order of the commit record

function crc32c(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0x82f63b78 : 0);
  }
  return ~crc >>> 0;
}

// Check and remove the CRC-32C behind a chunk; `committed` is the one in the commit record.
function unseal(bytes, committed) {
  const payload = bytes.subarray(0, -4), stored = bytes.readUInt32LE(bytes.length - 4);
  if (crc32c(payload) !== stored || (committed ?? stored) !== stored) throw Error("a checksum is wrong");
  return payload;
}

// --- Blosc, version 1 of its format -----------------------------------------------------------------------------------

function lz4(source, size) {
  const out = Buffer.alloc(size);
  let from = 0, to = 0;
  const longer = (length) => {
    if (length === 15) for (let byte = 255; byte === 255; length += byte) byte = source[from++];
    return length;
  };
  for (;;) {
    const token = source[from++], literals = longer(token >> 4);
    source.copy(out, to, from, (from += literals));
    to += literals;
    if (from >= source.length) return out;
    const distance = source.readUInt16LE(from);
    from += 2;
    for (let left = longer(token & 15) + 4; left > 0; left--, to++) out[to] = out[to - distance];
  }
}

function zstd(source) {
  if (!zlib.zstdDecompressSync) throw Error(`Node ${process.version} has no zstd: take 22.15, 23.8 or later`);
  return zlib.zstdDecompressSync(source);
}

// Bytes of a block as they were before Blosc sorted them by their place in a value (shuffle), or bits (bitshuffle).
function unshuffle(block, size, flags) {
  const values = Math.floor(block.length / size), out = Buffer.from(block);
  if (flags & 1)
    for (let byte = 0; byte < size; byte++)
      for (let value = 0; value < values; value++) out[value * size + byte] = block[byte * values + value];
  if (flags & 4 && values % 8 === 0) {
    out.fill(0, 0, values * size);
    for (let bit = 0; bit < 8 * size; bit++)
      for (let value = 0; value < values; value++) {
        const set = (block[(bit * values + value) >> 3] >> (value & 7)) & 1;
        out[value * size + (bit >> 3)] |= set << (bit & 7);
      }
  }
  return out;
}

function unblosc(bytes) {
  const flags = bytes[2], size = bytes[3], total = bytes.readUInt32LE(4), blockSize = bytes.readUInt32LE(8);
  if (flags & 2) return bytes.subarray(16, 16 + total); // stored without compression
  const decompress = { 1: lz4, 4: zstd }[flags >> 5];
  const blocks = [];
  for (let start = 0; start < total; start += blockSize) {
    const length = Math.min(blockSize, total - start);
    const parts = flags & 16 || length < blockSize ? 1 : size; // one compressed part for each byte of a value, or one
    let from = bytes.readUInt32LE(16 + 4 * blocks.length);
    const decoded = [];
    for (let part = 0; part < parts; part++) {
      const stored = bytes.readUInt32LE(from), raw = bytes.subarray(from + 4, (from += 4 + stored));
      decoded.push(stored === length / parts ? raw : decompress(raw, length / parts));
    }
    blocks.push(unshuffle(Buffer.concat(decoded), size, flags));
  }
  return Buffer.concat(blocks);
}

// --- the store --------------------------------------------------------------------------------------------------------

function float16(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}

function bfloat16(bits) {
  return new Float32Array(new Uint32Array([bits << 16]).buffer)[0];
}

// How many bytes a stored value has, and how it becomes a part of its map's scale, rounded to float32 as the scale is.
const PRECISIONS = {
  float16: [2, (raw, at) => float16(raw.readUInt16LE(at))],
  bfloat16: [2, (raw, at) => bfloat16(raw.readUInt16LE(at))],
  int8: [1, (raw, at) => Math.fround(raw.readInt8(at) * Math.fround(Math.abs(raw.readInt8(at)) / 127 ** 2))],
};

function record(shard) {
  const path = `${folder}/commits/c.${shard}.0`;
  if (!existsSync(path)) throw Error(`shard ${shard} is not committed`);
  const bytes = unseal(readFileSync(path));
  return Array.from({ length: bytes.length / 4 }, (_, place) => bytes.readUInt32LE(4 * place));
}

function readRows(array, shard, committed) {
  const raw = unseal(readFileSync(`${folder}/${array}/c.${shard}.0`), committed[1 + rows.indexOf(array)]);
  return raw.subarray(0, 4 * widths[array] * Math.min(shardSamples, dataset.samples - shard * shardSamples));
}

function readHeatmaps(shard, committed) {
  const file = readFileSync(`${folder}/heatmaps/c.${shard}.0.0.0.0`), scale = readRows("scale", shard, committed);
  const index = unseal(file.subarray(0, 16 * chunks * explainer.draws + 4));
  const samples = scale.length / 4 / explainer.draws, [bytes, decode] = PRECISIONS[storage.precision];
  const out = Buffer.alloc(4 * samples * explainer.draws * mapSize);
  for (let sample = 0, raw = []; sample < samples; sample++)
    for (let draw = 0; draw < explainer.draws; draw++) {
      const chunk = Math.floor(sample / storage.chunk_samples), row = sample % storage.chunk_samples;
      if (row === 0) {
        const entry = 16 * (chunk * explainer.draws + draw), start = Number(index.readBigUInt64LE(entry));
        const sealed = file.subarray(start, start + Number(index.readBigUInt64LE(entry + 8)));
        raw[draw] = unblosc(unseal(sealed, committed[1 + rows.length + draw * chunks + chunk]));
      }
      const map = sample * explainer.draws + draw, factor = scale.readFloatLE(4 * map);
      for (let value = 0; value < mapSize; value++)
        out.writeFloatLE(decode(raw[draw], bytes * (row * mapSize + value)) * factor, 4 * (map * mapSize + value));
    }
  return out;
}

function readHead(part) {
  const { shape } = JSON.parse(readFileSync(`${folder}/${part}/zarr.json`));
  return unseal(readFileSync(`${folder}/${part}/c/${shape.map(() => 0).join("/")}`));
}

function read(shard) {
  const committed = record(shard);
  return name === "heatmaps" ? readHeatmaps(shard, committed) : readRows(name, shard, committed);
}

const parts = name.startsWith("head/") ? [readHead(name)] : Array.from({ length: shards }, (_, shard) => read(shard));
process.stdout.write(Buffer.concat(parts));

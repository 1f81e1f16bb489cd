// What the header of a model's file says. Only the first bytes of the file are read, here in the browser: the weights stay where they are.

const FIRST = 1 << 20, MOST = 1 << 27; // bytes that are read at first, and at most
const GGML_TYPES = ["F32", "F16", "Q4_0", "Q4_1", null, null, "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16", null, null, null, "TQ1_0", "TQ2_0", null, null, null, "MXFP4"];
const STRING = 8, ARRAY = 9;
// type of a value in GGUF's metadata -> its bytes, and how a DataView reads it
const SCALARS = { 0: [1, "getUint8"], 1: [1, "getInt8"], 2: [2, "getUint16"], 3: [2, "getInt16"], 4: [4, "getUint32"], 5: [4, "getInt32"], 6: [4, "getFloat32"], 7: [1, "getUint8"], 10: [8, "getBigUint64"], 11: [8, "getBigInt64"], 12: [8, "getFloat64"] };

class Short extends Error {} // the bytes read so far end within the header

class Reader {
  constructor(buffer) {
    this.view = new DataView(buffer);
    this.at = 0;
  }
  take(bytes) {
    if (!(bytes >= 0 && Number.isSafeInteger(bytes))) throw new Error("a length in the header makes no sense; the file is damaged");
    if (this.at + bytes > this.view.byteLength) throw new Short();
    this.at += bytes;
    return this.at - bytes;
  }
  count() { return Number(this.view.getBigUint64(this.take(8), true)); }
  whole() { return this.view.getUint32(this.take(4), true); }
  text() {
    const length = this.count(), from = this.take(length);
    return new TextDecoder().decode(new Uint8Array(this.view.buffer, from, length));
  }
  scalar(type) {
    const [bytes, how] = SCALARS[type] ?? [];
    if (!bytes) throw new Error(`a value of the unknown type ${type} in the header; the file is damaged or newer than this page`);
    const value = this.view[how](this.take(bytes), true);
    return type === 7 ? value !== 0 : Number(value);
  }
  // A value of the metadata; of lists nothing is kept.
  value(type) {
    if (type === STRING) return this.text();
    if (type !== ARRAY) return this.scalar(type);
    const of = this.whole(), length = this.count();
    if (SCALARS[of]) this.take(SCALARS[of][0] * length);
    else for (let i = 0; i < length; i++) this.value(of);
    return null;
  }
}

// {metadata: scalars by name, tensors: name -> {shape, format}} of a GGUF file.
export function ggufHeader(buffer) {
  const reader = new Reader(buffer);
  if (reader.whole() !== 0x46554747) throw new Error("it does not begin as a GGUF file does");
  const version = reader.whole();
  if (version < 2 || version > 3) throw new Error(`it is GGUF of version ${version}; versions 2 and 3 are read`);
  const tensorCount = reader.count(), valueCount = reader.count(), metadata = {}, tensors = {};
  for (let i = 0; i < valueCount; i++) {
    const name = reader.text(), value = reader.value(reader.whole());
    if (value !== null) metadata[name] = value;
  }
  for (let i = 0; i < tensorCount; i++) {
    const name = reader.text(), shape = Array.from({ length: reader.whole() }, () => reader.count());
    const type = reader.whole();
    tensors[name] = { shape, format: GGML_TYPES[type] ?? `type ${type}` };
    reader.take(8); // where its bytes begin
  }
  return { metadata, tensors };
}

// The same of a safetensors file.
export function safetensorsHeader(buffer) {
  const reader = new Reader(buffer), length = reader.count();
  if (length > MOST) throw new Error("it does not begin as a safetensors file does");
  const from = reader.take(length), { __metadata__: metadata = {}, ...tensors } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, from, length)));
  return { metadata, tensors: Object.fromEntries(Object.entries(tensors).map(([name, { shape, dtype }]) => [name, { shape, format: dtype }])) };
}

// The header of a model's file, of which as much is read as its header takes.
export async function headerOf(file) {
  const read = file.name.endsWith(".gguf") ? ggufHeader : safetensorsHeader;
  for (let bytes = FIRST; ; bytes *= 4) {
    try {
      return read(await file.slice(0, bytes).arrayBuffer());
    } catch (error) {
      if (!(error instanceof Short)) throw new Error(`${file.name}: ${error.message}`);
      if (bytes >= file.size || bytes >= MOST) throw new Error(`${file.name} ends within its header; it was not copied whole`);
    }
  }
}

export const parametersOf = ({ tensors }) => Object.values(tensors).reduce((sum, { shape }) => sum + shape.reduce((product, side) => product * side, 1), 0);

// The format that most of the weights have.
export function precisionOf({ tensors }) {
  const weights = {};
  for (const { shape, format } of Object.values(tensors)) weights[format] = (weights[format] ?? 0) + shape.reduce((product, side) => product * side, 1);
  return Object.keys(weights).sort((a, b) => weights[b] - weights[a])[0] ?? null;
}

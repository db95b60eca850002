// Loaded before every file of tests (node --import): which methods of the SDKs were called and did not fail.
// What it sees goes to $NIDUS_REPORT_DIR, from where support/compatibility.py makes docs/compatibility.md.
import { mkdirSync, writeFileSync } from 'node:fs'
import { basename } from 'node:path'
import * as e2b from 'e2b'
import * as interpreter from '@e2b/code-interpreter'

const folder = process.env.NIDUS_REPORT_DIR
const called = new Set()
const wrapped = new WeakSet()

/** Names of an object's own functions, and of those that it inherits. */
function functions (object) {
  const names = new Set()
  for (let o = object; o && o !== Function.prototype && o !== Object.prototype; o = Object.getPrototypeOf(o))
    for (const name of Object.getOwnPropertyNames(o)) {
      const { value } = Object.getOwnPropertyDescriptor(o, name)
      if (name !== 'constructor' && typeof value === 'function' && value.prototype === undefined) names.add(name)
    }
  return [...names]
}

function record (label, object) {
  if (wrapped.has(object)) return
  wrapped.add(object)
  for (const name of functions(object)) {
    const original = object[name]
    const done = (value) => {
      called.add(`${label}.${name}`)
      parts(value)
      return value
    }
    object[name] = function (...args) {
      const value = original.apply(this, args)
      return typeof value?.then === 'function' && value instanceof Promise ? value.then(done) : done(value)
    }
  }
}

/** Classes that the SDK does not export are met on what its methods return. */
function parts (value) {
  if (value instanceof e2b.Sandbox)
    for (const [label, part] of [['Commands', value.commands], ['Filesystem', value.files], ['Pty', value.pty], ['Git', value.git]])
      if (part) record(label, Object.getPrototypeOf(part))
  const name = value?.constructor?.name
  if (name === 'CommandHandle' || name === 'WatchHandle') record(name, Object.getPrototypeOf(value))
  if (name === 'SandboxPaginator' || name === 'SnapshotPaginator' || name === 'SecretPaginator') record(name, Object.getPrototypeOf(value))
}

/** All that there is, for the table's rows. */
const known = () => {
  const all = []
  const add = (label, ...objects) => objects.forEach((o) => functions(o).forEach((name) => all.push(`${label}.${name}`)))
  add('Sandbox', e2b.Sandbox, e2b.Sandbox.prototype)
  add('Volume', e2b.Volume, e2b.Volume.prototype)
  add('Secret', e2b.Secret)
  add('Template', e2b.TemplateBase, e2b.TemplateBase.prototype, e2b.Template)
  add('CodeInterpreter', interpreter.Sandbox.prototype)
  // What a code interpreter's sandbox has from any sandbox is in that one's rows.
  const inherited = new Set(functions(e2b.Sandbox.prototype))
  return all.filter((m) => !m.startsWith('CodeInterpreter.') || !inherited.has(m.split('.')[1]))
}

if (folder) {
  const all = known()
  record('CodeInterpreter', interpreter.Sandbox.prototype)
  for (const [label, object] of [['Sandbox', e2b.Sandbox], ['Volume', e2b.Volume], ['Secret', e2b.Secret], ['Template', e2b.TemplateBase], ['Template', e2b.Template]]) {
    record(label, object)
    if (object.prototype) record(label, object.prototype)
  }
  process.on('exit', (code) => {
    if (code) return
    mkdirSync(folder, { recursive: true })
    const file = basename(process.argv[1] ?? 'none')
    writeFileSync(`${folder}/js-${file}.json`, JSON.stringify({ file, known: all, called: [...called] }))
  })
}

// JavaScript and TypeScript, a cell at a time, in one global scope.
//
// Requests are lines of JSON on descriptor 3, {code, count, env, once}, and so are the answers: {bundle, main} for what
// is displayed, {done, error}. What a cell prints goes to the pipes, each of which gets the mark when the cell has ended.
'use strict'

const fs = require('fs')
const net = require('net')
const path = require('path')
const util = require('util')
const vm = require('vm')
const { createRequire } = require('module')
const { pathToFileURL } = require('url')
const ts = require('typescript')

const language = process.argv[2]
const mark = `\0${process.argv[3]}\0`
const control = new net.Socket({ fd: 3, readable: true, writable: true })
const say = (message) => control.write(JSON.stringify(message) + '\n')

// Modules as a file of this directory would find them.
const near = () => createRequire(path.join(process.cwd(), 'cell.js'))
globalThis.require = Object.assign((name) => near()(name), { resolve: (name) => near().resolve(name) })
globalThis.module = { exports: {} }
globalThis.exports = globalThis.module.exports

async function load (name) {
  if (name.startsWith('.') || name.startsWith('/')) return import(pathToFileURL(path.resolve(name)))
  try {
    const found = near().resolve(name)
    return await import(path.isAbsolute(found) ? pathToFileURL(found) : found)
  } catch (error) {
    // What has no form for require is still found by import.
    if (error.code !== 'ERR_PACKAGE_PATH_NOT_EXPORTED' && error.code !== 'MODULE_NOT_FOUND') throw error
    return import(name)
  }
}

// Jupyter's way to say how a value looks, as Deno has it.
const looks = Symbol.for('Jupyter.display')

function bundle (value) {
  if (value !== null && typeof value === 'object' && typeof value[looks] === 'function') return value[looks]()
  return { 'text/plain': typeof value === 'string' ? value : util.inspect(value) }
}

globalThis.display = (value, options = {}) =>
  say({ bundle: options.raw ? value : bundle(value), main: false })
const shows = (kind) => (value) => display({ [kind]: value }, { raw: true })
globalThis.$$ = {
  text: shows('text/plain'), html: shows('text/html'), markdown: shows('text/markdown'), latex: shows('text/latex'),
  svg: shows('image/svg+xml'), png: shows('image/png'), jpeg: shows('image/jpeg'), json: shows('application/json'),
  mime: (values) => display(values, { raw: true })
}

// ---- cells as scripts

const options = {
  target: ts.ScriptTarget.ES2022,
  module: ts.ModuleKind.ESNext,
  preserveValueImports: true,
  isolatedModules: true
}

function withoutTypes (code) {
  const made = ts.transpileModule(code, { compilerOptions: options, fileName: 'cell.ts', reportDiagnostics: true })
  const [wrong] = made.diagnostics.filter((d) => d.category === ts.DiagnosticCategory.Error)
  if (wrong) {
    const { line } = ts.getLineAndCharacterOfPosition(wrong.file, wrong.start)
    throw new SyntaxError(`line ${line + 1}: ${ts.flattenDiagnosticMessageText(wrong.messageText, '\n')}`)
  }
  return made.outputText.replace(/^export \{\};?\s*$/m, '')
}

// The names that a declaration makes, patterns included.
function names (name) {
  if (ts.isIdentifier(name)) return [name.text]
  return name.elements.flatMap((e) => (ts.isOmittedExpression(e) ? [] : names(e.name)))
}

function awaits (node) {
  if (ts.isAwaitExpression(node) || (ts.isForOfStatement(node) && node.awaitModifier)) return true
  if (ts.isFunctionLike(node) || ts.isClassLike(node)) return false
  return ts.forEachChild(node, awaits) || false
}

function importOf (node) {
  const from = JSON.stringify(node.moduleSpecifier.text)
  const clause = node.importClause
  if (!clause) return { names: [], text: `await __load(${from});` }
  const parts = []
  const made = []
  const bound = clause.namedBindings
  if (clause.name) { parts.push(`default: ${clause.name.text}`); made.push(clause.name.text) }
  if (bound && ts.isNamedImports(bound)) {
    for (const e of bound.elements) {
      parts.push(`${JSON.stringify((e.propertyName || e.name).text)}: ${e.name.text}`)
      made.push(e.name.text)
    }
  }
  let out = `({ ${parts.join(', ')} } = await __load(${from}));`
  if (bound && ts.isNamespaceImport(bound)) {
    made.push(bound.name.text)
    out = `${bound.name.text} = await __load(${from}); ${clause.name ? `({ default: ${clause.name.text} } = ${bound.name.text});` : ''}`
  }
  return { names: made, text: out }
}

// What a cell declares is global and may be declared again by the next; import and await work at its top. A cell that
// waits becomes an async function, and its last expression what that gives.
function scriptOf (code) {
  const file = ts.createSourceFile('cell.js', code, ts.ScriptTarget.Latest, true, ts.ScriptKind.JS)
  const waits = file.statements.some((s) => ts.isImportDeclaration(s) || awaits(s))
  const globals = new Set()
  const functions = []
  const out = []
  const last = file.statements[file.statements.length - 1]
  for (const node of file.statements) {
    let text = node.getText(file)
    for (const m of (ts.canHaveModifiers ? ts.getModifiers(node) : node.modifiers) || []) {
      if (m.kind === ts.SyntaxKind.ExportKeyword || m.kind === ts.SyntaxKind.DefaultKeyword) text = text.replace(m.getText(file), '')
    }
    if (ts.isImportDeclaration(node)) {
      const made = importOf(node)
      made.names.forEach((n) => globals.add(n))
      text = made.text
    } else if (ts.isExportDeclaration(node)) {
      text = ''
    } else if (ts.isExportAssignment(node)) {
      text = `(${node.expression.getText(file)});`
    } else if (ts.isVariableStatement(node)) {
      const parts = node.declarationList.declarations.map((d) => {
        names(d.name).forEach((n) => globals.add(n))
        const value = d.initializer ? d.initializer.getText(file) : 'undefined'
        return `(${d.name.getText(file)} = ${value});`
      })
      // As a declaration it has no value.
      text = parts.join(' ') + (waits ? '' : ' void 0;')
    } else if (ts.isClassDeclaration(node) && node.name) {
      globals.add(node.name.text)
      text = `${node.name.text} = ${text.trim()};` + (waits ? '' : ' void 0;')
    } else if (waits && ts.isFunctionDeclaration(node) && node.name) {
      functions.push(`globalThis[${JSON.stringify(node.name.text)}] = ${node.name.text};`)
    } else if (waits && node === last && ts.isExpressionStatement(node)) {
      text = `return (${node.expression.getText(file)});`
    }
    // Lines stay where they are, for traces.
    out.push(code.slice(node.pos, node.getStart(file)) + text)
  }
  const declared = globals.size ? `var ${[...globals].join(', ')}; ` : ''
  const body = out.join('')
  return waits ? `${declared}(async () => { ${functions.join(' ')} ${body}\n})()` : declared + body
}

function compile (code, name) {
  const script = (text) => new vm.Script(text, { filename: name, importModuleDynamically: load })
  const plain = language === 'typescript' ? withoutTypes : (text) => text
  const trimmed = code.trim()
  if (trimmed.startsWith('{') && trimmed.endsWith('}')) {
    // An object and not a block, if it can be one.
    try { return script(plain(`(${trimmed})`)) } catch {}
  }
  return script(scriptOf(plain(code)))
}

// ---- running

let interrupted = null
process.on('SIGINT', () => interrupted && interrupted())
process.on('uncaughtException', (error) => process.stderr.write(`Uncaught ${util.inspect(error)}\n`))
process.on('unhandledRejection', (error) => process.stderr.write(`Unhandled rejection: ${util.inspect(error)}\n`))

const stopped = () => Object.assign(new Error('the execution was interrupted'), { name: 'KeyboardInterrupt' })

async function run ({ code, count, env, once }) {
  Object.assign(process.env, env)
  const before = Object.fromEntries(Object.keys(once).map((n) => [n, process.env[n]]))
  Object.assign(process.env, once)
  const end = { done: true }
  try {
    const script = compile(code, `cell-${count}`)
    const stop = new Promise((resolve, reject) => { interrupted = () => reject(stopped()) })
    let value = script.runInThisContext({ breakOnSigint: true })
    if (util.types.isPromise(value)) value = await Promise.race([value, stop])
    if (value !== undefined) say({ bundle: bundle(value), main: true })
  } catch (error) {
    const e = error && error.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED' ? stopped() : error
    const isError = util.types.isNativeError(e) || e instanceof Error
    end.error = {
      name: isError ? e.name : 'Error',
      value: isError ? e.message : util.inspect(e),
      traceback: isError ? String(e.stack).split('\n').filter((l) => !l.includes(__filename)).join('\n') : util.inspect(e)
    }
  } finally {
    interrupted = null
    for (const [name, value] of Object.entries(before)) {
      if (value === undefined) delete process.env[name]
      else process.env[name] = value
    }
  }
  fs.writeSync(1, mark)
  fs.writeSync(2, mark)
  say(end)
}

globalThis.__load = load
let queue = Promise.resolve()
let rest = ''
control.setEncoding('utf8')
control.on('data', (data) => {
  const lines = (rest + data).split('\n')
  rest = lines.pop()
  for (const line of lines) queue = queue.then(() => run(JSON.parse(line)))
})
control.on('close', () => process.exit(0))
// The first cell of both kinds finds the compiler warm.
compile(withoutTypes('const { a }: { a: number } = await Promise.resolve({ a: 1 }); class B {}'), 'warm')
say({ ready: true })

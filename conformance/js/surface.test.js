// The parts of the JavaScript SDK that the other files do not reach: volumes, secrets, templates, git, watching.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { test } from 'node:test'
import { E2B, FilesystemEventType, Sandbox, Secret, SecretNotFoundError, Template, Volume, VolumeError, VolumeNotFoundError, VolumePathNotFoundError } from 'e2b'
import { newSandbox, rejection, rest, waitFor } from './support.js'

const fresh = (what) => `${what}-${randomUUID().slice(0, 8)}`
const timeout = 240_000

test('volumes', { timeout }, async () => {
  const volume = await Volume.create(fresh('v'))
  try {
    await volume.makeDir('/d/e', { force: true })
    await volume.writeFile('/d/e/f', 'one', { mode: 0o600 })
    await rejection(volume.writeFile('/d/e/f', 'two'), VolumeError)
    await volume.writeFile('/d/e/f', 'two', { force: true })
    assert.equal(await volume.readFile('/d/e/f'), 'two')
    assert.deepEqual((await volume.list('/d', { depth: 2 })).map((e) => e.path), ['/d/e', '/d/e/f'])
    assert.equal((await volume.getInfo('/d/e/f')).size, 3)
    assert.equal((await volume.updateMetadata('/d/e/f', { mode: 0o640 })).mode, 0o640)
    assert.equal(await volume.exists('/d/e/f'), true)
    await volume.remove('/d')
    assert.equal(await volume.exists('/d/e/f'), false)
    await rejection(volume.readFile('/d/e/f'), VolumePathNotFoundError)
    const again = await Volume.connect(volume.volumeId)
    await again.writeFile('/g', new Blob(['g']))
    assert.equal(await volume.readFile('/g'), 'g')
    assert.equal((await Volume.getInfo(volume.volumeId)).name, volume.name)
    assert.ok((await Volume.list()).some((v) => v.volumeId === volume.volumeId))
  } finally {
    assert.equal(await Volume.destroy(volume.volumeId), true)
  }
  assert.equal(await Volume.destroy(volume.volumeId), false)
  await rejection(Volume.connect(volume.volumeId), VolumeNotFoundError)
})

test('a volume in two sandboxes', { timeout }, async () => {
  const volume = await Volume.create(fresh('m'))
  try {
    const [one, other] = [await newSandbox({ volumeMounts: { '/mnt/data': volume } }), await newSandbox({ volumeMounts: { '/data': volume.name } })]
    await one.files.write('/mnt/data/f', 'shared')
    assert.equal(await other.files.read('/data/f'), 'shared')
    assert.equal(await volume.readFile('/f'), 'shared')
    await rejection(Sandbox.create({ volumeMounts: { '/mnt/data': 'no-such-volume' } }), Error)
  } finally {
    await Volume.destroy(volume.volumeId)
  }
})

test('secrets', { timeout }, async () => {
  const name = fresh('s')
  const made = await Secret.create(name, 'v', { metadata: { a: 'b' } })
  assert.deepEqual([made.name, made.version, made.metadata], [name, 1, { a: 'b' }])
  assert.equal((await Secret.update(name, 'w')).version, 2)
  assert.equal((await Secret.getInfo(made.secretId)).name, name)
  assert.equal(await Secret.exists(name), true)
  assert.ok((await Secret.list().nextItems()).some((s) => s.name === name))
  assert.equal(Secret.fill(name), `\${e2b.secrets.${name}}`)
  assert.equal(Secret.iamToken({ audience: 'a', tokenType: 'JWT-SVID' }).audience, 'a')
  assert.equal(await Secret.destroy(name), true)
  await rejection(Secret.getInfo(name), SecretNotFoundError)
})

test('templates: in the background, tags, names', { timeout }, async () => {
  const name = fresh('js')
  const template = Template().fromTemplate('base').setWorkdir('/app').setUser('user').setEnvs({ A: '1' })
    .runCmd('echo $A > /home/user/a').makeDir('/home/user/d').makeSymlink('/home/user/a', '/home/user/l')
    .rename('/home/user/d', '/home/user/e').remove('/home/user/e', { recursive: true })
    .setStartCmd('sleep 1000', 'true')
  assert.equal(await Template.exists(name), false)
  assert.equal(await Template.aliasExists(name), false)
  const info = await Template.buildInBackground(template, name, { cpuCount: 1, memoryMB: 512 })
  const status = await waitFor('the build', async () => {
    const s = await Template.getBuildStatus(info)
    return ['ready', 'error'].includes(s.status) && s
  }, 120)
  assert.equal(status.status, 'ready', JSON.stringify(status.reason))
  assert.equal(await Template.exists(name), true)
  await Template.assignTags(`${name}:default`, ['v1'])
  assert.deepEqual((await Template.getTags(name)).map((t) => t.tag).sort(), ['default', 'v1'])
  await Template.removeTags(name, 'v1')
  const logs = []
  await Template.build(template, name, { cpuCount: 1, memoryMB: 512, onBuildLogs: (l) => logs.push(l.message) })
  assert.ok(logs.some((l) => l.includes('0 steps done')))
  const sbx = await Sandbox.create(name, { timeoutMs: 120_000 })
  assert.equal((await sbx.commands.run('cat /home/user/l; ls -d /home/user/e 2>&1 || true')).stdout.split('\n')[0], '1')
  await sbx.kill()
  assert.equal((await rest('DELETE', `/templates/${name}`)).status, 204)
  assert.match(Template.toDockerfile(Template().fromImage('x').runCmd('true')), /RUN true/)
  assert.ok(await Template.toJSON(template))
})

test('git', { timeout }, async () => {
  const { git, files, commands } = await newSandbox()
  await git.configureUser('Me', 'me@example.test')
  await git.init('/home/user/far.git', { bare: true })
  await git.init('/home/user/r', { initialBranch: 'main' })
  await files.write('/home/user/r/a', 'one\n')
  assert.deepEqual((await git.status('/home/user/r')).fileStatus.map((f) => f.name), ['a'])
  await git.add('/home/user/r')
  await git.commit('/home/user/r', 'first')
  await git.createBranch('/home/user/r', 'side')
  assert.deepEqual((await git.branches('/home/user/r')).branches.sort(), ['main', 'side'])
  await git.checkoutBranch('/home/user/r', 'main')
  await git.deleteBranch('/home/user/r', 'side')
  await git.remoteAdd('/home/user/r', 'origin', '/home/user/far.git')
  assert.equal(await git.remoteGet('/home/user/r', 'origin'), '/home/user/far.git')
  await git.push('/home/user/r', { remote: 'origin', branch: 'main' })
  await git.clone('/home/user/far.git', { path: '/home/user/copy', branch: 'main' })
  await files.write('/home/user/r/a', 'two\n')
  await git.restore('/home/user/r', { paths: ['a'] })
  assert.equal(await files.read('/home/user/r/a'), 'one\n')
  await files.write('/home/user/r/a', 'three\n')
  await git.add('/home/user/r', { files: ['a'] })
  await git.commit('/home/user/r', 'second')
  await git.push('/home/user/r')
  await git.pull('/home/user/copy')
  assert.equal(await files.read('/home/user/copy/a'), 'three\n')
  await git.reset('/home/user/r', { mode: 'hard', target: 'HEAD~1' })
  assert.equal(await files.read('/home/user/r/a'), 'one\n')
  await git.setConfig('nidus.test', 'yes', { scope: 'local', path: '/home/user/r' })
  assert.equal(await git.getConfig('nidus.test', { scope: 'local', path: '/home/user/r' }), 'yes')
  await git.dangerouslyAuthenticate({ username: 'user', password: 'token' })
  assert.match((await commands.run('git config --global --list')).stdout, /credential/)
})

test('a directory that is watched', { timeout }, async () => {
  const { files } = await newSandbox()
  await files.makeDir('/home/user/w')
  const seen = []
  const handle = await files.watchDir('/home/user/w', (e) => seen.push(e))
  await files.write('/home/user/w/a', 'x')
  await waitFor('the file to be seen', () => seen.some((e) => e.name === 'a' && e.type === FilesystemEventType.CREATE), 60)
  await handle.stop()
})

test('snapshots, gateways and clients of one setting', { timeout }, async () => {
  const sbx = await newSandbox()
  const snapshot = await sbx.createSnapshot()
  assert.ok((await sbx.listSnapshots().nextItems()).some((s) => s.snapshotId === snapshot.snapshotId))
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.match(sbx.getMcpUrl(), /^http/)
  await sbx.files.makeDir('/etc/mcp-gateway', { user: 'root' })
  await sbx.files.write('/etc/mcp-gateway/.token', 'tok', { user: 'root' })
  assert.equal(await sbx.getMcpToken(), 'tok')
  assert.match(await sbx.uploadUrl('/home/user/f'), /signature=/)
  assert.match(await sbx.downloadUrl('/home/user/f'), /signature=/)
  await sbx.updateNetwork({ denyOut: ['0.0.0.0/0'] })
  assert.ok(await waitFor('figures', async () => (await sbx.getMetrics()).length, 60))
  await sbx.betaPause()
  await sbx.connect()
  const client = new E2B({ apiKey: process.env.E2B_API_KEY })
  assert.ok((await client.Sandbox.list().nextItems()).length)
})

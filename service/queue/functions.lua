#!lua name=@LIBRARY@
-- The promises of the queue, each one atomic step on the server, on the server's clock.
--
-- KEYS[1] is the prefix with its hash tag, {lowbit}: all keys below it share one cluster slot. client.py lists them.
-- A job is *owned* by one attempt: renew, finish, fail and release name (id, attempt, worker) and are refused ('lost') to
-- anyone else. Every function may be sent twice, because a client that lost the answer will: the second call changes
-- nothing and answers like the first.

local CLASS = 1e13 -- score = priority * CLASS + sequence number: exact in a double, and a job keeps it for life
local TOKENS = 64 -- wake-ups kept for workers that are busy
local BATCH = 100 -- jobs one sweep moves, so that no call takes long
local LONGEST_JOB_MS = 7 * 24 * 3600 * 1000 -- pace of an artifact is forgotten after so long without a job

local function key(p, ...) return table.concat({ p, ... }, ':') end

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function text(number) return string.format('%.0f', number) end

local function job_of(p, id)
  local flat, job = redis.call('HGETALL', key(p, 'job', id)), {}
  if #flat == 0 then return nil end
  for i = 1, #flat, 2 do job[flat[i]] = flat[i + 1] end
  return job
end

local function set(p, job, ...)
  local pairs_ = { ... }
  for i = 1, #pairs_, 2 do job[pairs_[i]] = tostring(pairs_[i + 1]) end
  redis.call('HSET', key(p, 'job', job.id), unpack(pairs_))
end

-- Events are numbered from 1 in each job; the newest `events` of them can be replayed.
local function emit(p, job, name, data)
  local number = redis.call('HINCRBY', key(p, 'job', job.id), 'event', 1)
  local stream = key(p, 'events', job.id)
  redis.call('XADD', stream, 'MAXLEN', job.events, number .. '-0', 'event', name, 'data', cjson.encode(data))
  redis.call('PUBLISH', stream, number)
end

local function to_ready(p, job)
  redis.call('ZADD', key(p, 'ready', job.artifact), job.place, job.id)
  local wake = key(p, 'wake', job.artifact)
  redis.call('LPUSH', wake, '1')
  redis.call('LTRIM', wake, 0, TOKENS - 1)
end

local function off_the_queue(p, job)
  redis.call('ZREM', key(p, 'ready', job.artifact), job.id)
  redis.call('ZREM', key(p, 'delayed'), job.id)
  redis.call('ZREM', key(p, 'waiting'), job.id)
end

local function off_the_worker(p, job)
  redis.call('ZREM', key(p, 'leases'), job.id)
  if job.worker and redis.call('HGET', key(p, 'holding'), job.worker) == job.id then
    redis.call('HDEL', key(p, 'holding'), job.worker)
  end
end

-- Back among the waiting at its old place; at once, or after `delay` ms.
local function requeue(p, job, now, delay)
  off_the_worker(p, job)
  set(p, job, 'status', 'queued', 'since', text(now + delay), 'deadline', text(now + delay + tonumber(job.queue_ttl)))
  redis.call('HDEL', key(p, 'job', job.id), 'step', 'of')
  redis.call('ZADD', key(p, 'waiting'), job.deadline, job.id)
  if delay > 0 then
    redis.call('ZADD', key(p, 'delayed'), text(now + delay), job.id)
  else
    to_ready(p, job)
  end
  emit(p, job, 'status', { status = 'queued', attempt = tonumber(job.attempt) })
end

local function end_job(p, job, status, now, failure)
  off_the_queue(p, job)
  off_the_worker(p, job)
  set(p, job, 'status', status, 'finished', text(now))
  if failure then set(p, job, 'error', failure) end
  emit(p, job, 'done', { status = status, attempt = tonumber(job.attempt) })
  redis.call('PEXPIRE', key(p, 'job', job.id), job.keep)
  redis.call('PEXPIRE', key(p, 'events', job.id), job.keep)
  redis.call('ZADD', key(p, 'removals'), text(now + tonumber(job.keep)), job.id)
end

local function dead_letter(p, job, now, failure)
  end_job(p, job, 'failed', now, failure)
  redis.call('ZADD', key(p, 'dead'), text(now), job.id)
end

-- An attempt that its worker closed (finished, failed, gave back) stays closed: repeating the call repeats the answer.
local function close(p, job, verdict)
  set(p, job, 'closed', job.attempt, 'verdict', verdict)
  return verdict
end

-- Whether this attempt still owns the job. An attempt whose lease ran out owns it as long as no other attempt began: after an
-- outage of the queue server, a worker that went on working takes its job back instead of doing it twice.
local function owned(job, attempt, worker)
  return job and job.attempt == attempt and job.worker == worker and job.closed ~= attempt
    and (job.status == 'running' or job.status == 'queued')
end

local function refusal(job, attempt, worker)
  if job and job.closed == attempt and job.worker == worker then return job.verdict end
  return 'lost'
end

-- What time alone changes: due retries become ready, lost leases go back or to the dead letters, old waiters expire.
-- Returns {what, kind, artifact, what, kind, artifact, ...} for the caller's metrics.
local function sweep(p, now, max_attempts)
  local swept = {}
  local function note(what, job)
    swept[#swept + 1], swept[#swept + 2], swept[#swept + 3] = what, job.kind, job.artifact
  end

  for _, id in ipairs(redis.call('ZRANGE', key(p, 'delayed'), '-inf', text(now), 'BYSCORE', 'LIMIT', 0, BATCH)) do
    redis.call('ZREM', key(p, 'delayed'), id)
    local job = job_of(p, id)
    if job then to_ready(p, job) end
  end

  for _, id in ipairs(redis.call('ZRANGE', key(p, 'leases'), '-inf', text(now), 'BYSCORE', 'LIMIT', 0, BATCH)) do
    redis.call('ZREM', key(p, 'leases'), id)
    local job = job_of(p, id)
    if job and job.status == 'running' then
      set(p, job, 'strikes', tonumber(job.strikes) + 1)
      if job.cancel == '1' then
        end_job(p, job, 'cancelled', now)
        note('cancelled', job)
      elseif tonumber(job.strikes) >= max_attempts then
        dead_letter(p, job, now, cjson.encode({
          type = 'urn:lowbit:problem:worker-lost',
          title = 'Worker lost',
          detail = 'the worker stopped renewing its lease in each of ' .. job.strikes .. ' attempts, the last on ' .. job.worker,
        }))
        note('dead', job)
      else
        set(p, job, 'adoptable', job.attempt)
        requeue(p, job, now, 0)
        note('requeued', job)
      end
    end
  end

  for _, id in ipairs(redis.call('ZRANGE', key(p, 'waiting'), '-inf', text(now), 'BYSCORE', 'LIMIT', 0, BATCH)) do
    redis.call('ZREM', key(p, 'waiting'), id)
    local job = job_of(p, id)
    if job and job.status == 'queued' then
      end_job(p, job, 'expired', now)
      note('expired', job)
    end
  end
  return swept
end

-- Seconds of work in one job of this artifact, as measured on the last ones; 0 where none has ended yet.
local function pace(p, artifact)
  return tonumber(redis.call('GET', key(p, 'pace', artifact)) or '0')
end

local function living(p, now) return redis.call('ZCOUNT', key(p, 'workers'), text(now), '+inf') end

local function view(p, id)
  local flat = redis.call('HGETALL', key(p, 'job', id))
  if #flat == 0 then return false end
  local artifact = redis.call('HGET', key(p, 'job', id), 'artifact')
  local rank = redis.call('ZRANK', key(p, 'ready', artifact), id)
  return { rank or -1, flat }
end

-- What a submission is answered without a job being created; nil where one would be.
local function foregone(p, now, idem_key, fingerprint, bound, artifact)
  if idem_key ~= '' then
    local first = redis.call('HMGET', key(p, 'idem', idem_key), 'id', 'fingerprint')
    local there = first[1] and view(p, first[1]) -- a key whose job is gone is free again
    if there and first[2] ~= fingerprint then return { 'conflict', first[1] } end
    if there then return { 'same', there } end
  end
  if redis.call('ZCARD', key(p, 'waiting')) >= tonumber(bound) then
    return { 'full', math.ceil(pace(p, artifact) / math.max(1, living(p, now))) }
  end
end

-- id kind artifact priority task bound queue_ttl keep events idem_key fingerprint idem_ttl
-- -> {'new' | 'same', view} | {'conflict', other id} | {'full', ms until a place is free}
local function enqueue(keys, args)
  local p, now = keys[1], now_ms()
  local id, kind, artifact, priority, task, bound = unpack(args, 1, 6)
  local queue_ttl, keep, events, idem_key, fingerprint, idem_ttl = unpack(args, 7, 12)

  if redis.call('EXISTS', key(p, 'job', id)) == 1 then return { 'same', view(p, id) } end
  local answer = foregone(p, now, idem_key, fingerprint, bound, artifact)
  if answer then return answer end

  local sequence = redis.call('INCR', key(p, 'sequence'))
  local place = text(tonumber(priority) * CLASS + sequence)
  local deadline = text(now + tonumber(queue_ttl))
  local job = { id = id, artifact = artifact, place = place, events = events }
  set(p, job, 'id', id, 'kind', kind, 'artifact', artifact, 'task', task, 'status', 'queued', 'created', text(now),
    'since', text(now), 'deadline', deadline, 'place', place, 'sequence', sequence, 'attempt', 0, 'strikes', 0,
    'queue_ttl', queue_ttl, 'keep', keep, 'events', events)
  redis.call('ZADD', key(p, 'jobs'), sequence, id)
  redis.call('ZADD', key(p, 'waiting'), deadline, id)
  redis.call('SADD', key(p, 'lanes'), artifact)
  redis.call('ZREM', key(p, 'removals'), id)
  if idem_key ~= '' then
    local idem = key(p, 'idem', idem_key)
    redis.call('DEL', idem)
    redis.call('HSET', idem, 'id', id, 'fingerprint', fingerprint)
    redis.call('PEXPIRE', idem, idem_ttl)
  end
  to_ready(p, job)
  emit(p, job, 'status', { status = 'queued', attempt = 0 })
  return { 'new', view(p, id) }
end

-- idem_key fingerprint bound artifact -> as enqueue would answer, {'room'} where it would create
local function precheck(keys, args)
  return foregone(keys[1], now_ms(), unpack(args, 1, 4)) or { 'room' }
end

-- worker lease hot patience max_attempts artifact... -> {swept, waited ms, view} | {swept}
-- Priority first; inside the best class the hot artifact, unless another's oldest job has waited out its patience; then age.
local function claim(keys, args)
  local p, now = keys[1], now_ms()
  local worker, lease, hot, patience, max_attempts = unpack(args, 1, 5)
  local swept = sweep(p, now, tonumber(max_attempts))

  local held = redis.call('HGET', key(p, 'holding'), worker)
  if held then -- the answer to its last claim never reached it
    local job = job_of(p, held)
    if job and job.status == 'running' and job.worker == worker then
      redis.call('ZADD', key(p, 'leases'), text(now + tonumber(lease)), held)
      return { swept, 0, view(p, held) }
    end
  end

  local best, best_score, hot_id, hot_score
  for i = 6, #args do
    local head = redis.call('ZRANGE', key(p, 'ready', args[i]), 0, 0, 'WITHSCORES')
    if head[1] then
      local score = tonumber(head[2])
      if not best or score < best_score then best, best_score = head[1], score end
      if args[i] == hot then hot_id, hot_score = head[1], score end
    end
  end
  if not best then return { swept } end
  if hot_id and hot_id ~= best and math.floor(hot_score / CLASS) == math.floor(best_score / CLASS) then
    local since = tonumber(redis.call('HGET', key(p, 'job', best), 'since') or '0')
    if now - since <= tonumber(patience) then best = hot_id end
  end

  local job = job_of(p, best)
  local waited = math.max(0, now - tonumber(job.since))
  off_the_queue(p, job)
  set(p, job, 'status', 'running', 'attempt', tonumber(job.attempt) + 1, 'worker', worker, 'started', text(now))
  redis.call('HDEL', key(p, 'job', best), 'step', 'of')
  redis.call('ZADD', key(p, 'leases'), text(now + tonumber(lease)), best)
  redis.call('HSET', key(p, 'holding'), worker, best)
  emit(p, job, 'status', { status = 'running', attempt = tonumber(job.attempt) })
  return { swept, waited, view(p, best) }
end

-- An owner whose lease had run out, and whose job nobody took, has it back; the strike is taken back with it.
local function adopt(p, job, worker)
  if job.status == 'running' then return end
  off_the_queue(p, job)
  if job.adoptable == job.attempt then set(p, job, 'strikes', math.max(0, tonumber(job.strikes) - 1)) end
  set(p, job, 'status', 'running')
  redis.call('HSET', key(p, 'holding'), worker, job.id)
  emit(p, job, 'status', { status = 'running', attempt = tonumber(job.attempt) })
end

-- id attempt worker lease step of -> 'ok' | 'cancel' | 'lost'     (of = 0: no step yet)
local function renew(keys, args)
  local p, now = keys[1], now_ms()
  local id, attempt, worker, lease, step, of = unpack(args, 1, 6)
  local job = job_of(p, id)
  if not owned(job, attempt, worker) then return 'lost' end
  adopt(p, job, worker)
  redis.call('ZADD', key(p, 'leases'), text(now + tonumber(lease)), id)
  if of ~= '0' and (job.step ~= step or job.of ~= of) then
    set(p, job, 'step', step, 'of', of)
    emit(p, job, 'progress', { step = tonumber(step), of = tonumber(of), attempt = tonumber(attempt) })
  end
  return job.cancel == '1' and 'cancel' or 'ok'
end

-- id attempt worker results -> 'ok' | 'cancelled' | 'lost'
local function finish(keys, args)
  local p, now = keys[1], now_ms()
  local id, attempt, worker, results, kernels = unpack(args, 1, 5)
  local job = job_of(p, id)
  if not owned(job, attempt, worker) then return refusal(job, attempt, worker) end
  if job.cancel == '1' then -- a caller was promised that this job ends cancelled
    end_job(p, job, 'cancelled', now)
    return close(p, job, 'cancelled')
  end
  local took = now - tonumber(job.started)
  local before = pace(p, job.artifact)
  local mean = before == 0 and took or 0.8 * before + 0.2 * took
  redis.call('SET', key(p, 'pace', job.artifact), text(mean), 'PX', LONGEST_JOB_MS)
  set(p, job, 'results', results)
  set(p, job, 'kernels', kernels)
  if job.of then set(p, job, 'step', job.of) end
  end_job(p, job, 'succeeded', now)
  return close(p, job, 'ok')
end

-- id attempt worker error retry max_attempts backoff backoff_max -> 'failed' | 'dead' | 'retry' | 'cancelled' | 'lost'
local function fail(keys, args)
  local p, now = keys[1], now_ms()
  local id, attempt, worker, failure, retry, max_attempts, backoff, backoff_max = unpack(args, 1, 8)
  local job = job_of(p, id)
  if not owned(job, attempt, worker) then return refusal(job, attempt, worker) end
  if job.cancel == '1' then
    end_job(p, job, 'cancelled', now)
    return close(p, job, 'cancelled')
  end
  adopt(p, job, worker)
  set(p, job, 'strikes', tonumber(job.strikes) + 1)
  if retry ~= '1' then
    end_job(p, job, 'failed', now, failure)
    return close(p, job, 'failed')
  end
  if tonumber(job.strikes) >= tonumber(max_attempts) then
    dead_letter(p, job, now, failure)
    return close(p, job, 'dead')
  end
  local delay = math.min(tonumber(backoff) * 2 ^ (tonumber(job.strikes) - 1), tonumber(backoff_max))
  requeue(p, job, now, math.ceil(delay))
  return close(p, job, 'retry')
end

-- id attempt worker -> 'ok' | 'cancelled' | 'lost'     Given back unfinished: no strike, and its old place.
local function release(keys, args)
  local p, now = keys[1], now_ms()
  local id, attempt, worker = unpack(args, 1, 3)
  local job = job_of(p, id)
  if not owned(job, attempt, worker) then return refusal(job, attempt, worker) end
  if job.cancel == '1' then
    end_job(p, job, 'cancelled', now)
    return close(p, job, 'cancelled')
  end
  adopt(p, job, worker)
  requeue(p, job, now, 0)
  return close(p, job, 'ok')
end

-- id -> {'missing'} | {'cancelled' | 'again' | 'asked' | 'ended', view}
local function cancel(keys, args)
  local p, now, id = keys[1], now_ms(), args[1]
  local job = job_of(p, id)
  if not job then return { 'missing' } end
  local verdict = 'ended'
  if job.status == 'queued' then
    end_job(p, job, 'cancelled', now)
    verdict = 'cancelled'
  elseif job.status == 'running' then
    set(p, job, 'cancel', 1)
    verdict = 'asked'
  elseif job.status == 'cancelled' then
    verdict = 'again'
  end
  return { verdict, view(p, id) }
end

-- cursor limit -> {next cursor or '', view, view, ...}     newest first
local function list(keys, args)
  local p, cursor, limit = keys[1], args[1], tonumber(args[2])
  local from = cursor == '' and '+inf' or '(' .. cursor
  local ids = redis.call('ZRANGE', key(p, 'jobs'), from, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, limit + 1, 'WITHSCORES')
  local page = { '' }
  for i = 1, math.min(#ids, 2 * limit), 2 do
    local one = view(p, ids[i])
    if one then page[#page + 1] = one end
  end
  if #ids > 2 * limit then page[1] = ids[2 * limit] end
  return page
end

-- -> {waiting, delayed, running, dead, living workers, artifact, ready, oldest ms, pace ms, artifact, ...}
local function stats(keys)
  local p, now = keys[1], now_ms()
  local reply = {
    redis.call('ZCARD', key(p, 'waiting')), redis.call('ZCARD', key(p, 'delayed')),
    redis.call('ZCARD', key(p, 'leases')), redis.call('ZCARD', key(p, 'dead')), living(p, now),
  }
  for _, artifact in ipairs(redis.call('SMEMBERS', key(p, 'lanes'))) do
    local ready = key(p, 'ready', artifact)
    local head = redis.call('ZRANGE', ready, 0, 0)[1]
    local since = head and redis.call('HGET', key(p, 'job', head), 'since')
    local oldest = since and math.max(0, now - tonumber(since)) or 0
    for _, value in ipairs({ artifact, redis.call('ZCARD', ready), oldest, math.ceil(pace(p, artifact)) }) do
      reply[#reply + 1] = value
    end
  end
  return reply
end

-- worker ttl names_json keep tested_json (name info_json)...     A living worker, what it can run, and what it tested.
local function beat(keys, args)
  local p, now = keys[1], now_ms()
  local worker, ttl, names, keep, tested = unpack(args, 1, 5)
  redis.call('ZADD', key(p, 'workers'), text(now + tonumber(ttl)), worker)
  redis.call('HSET', key(p, 'abilities'), worker, names)
  redis.call('HSET', key(p, 'tested'), worker, tested)
  for i = 6, #args, 2 do
    redis.call('HSET', key(p, 'artifacts'), args[i], args[i + 1])
    redis.call('ZADD', key(p, 'seen'), text(now), args[i])
  end
  for _, dead in ipairs(redis.call('ZRANGE', key(p, 'workers'), '-inf', '(' .. text(now), 'BYSCORE')) do
    redis.call('ZREM', key(p, 'workers'), dead)
    redis.call('HDEL', key(p, 'abilities'), dead)
  end
  -- Not in that loop: code of before `tested` forgets the dead too, and leaves this behind.
  for _, one in ipairs(redis.call('HKEYS', key(p, 'tested'))) do
    if not redis.call('ZSCORE', key(p, 'workers'), one) then redis.call('HDEL', key(p, 'tested'), one) end
  end
  for _, old in ipairs(redis.call('ZRANGE', key(p, 'seen'), '-inf', text(now - tonumber(keep)), 'BYSCORE')) do
    redis.call('ZREM', key(p, 'seen'), old)
    redis.call('HDEL', key(p, 'artifacts'), old)
  end
  return 'ok'
end

-- worker
local function leave(keys, args)
  redis.call('ZREM', key(keys[1], 'workers'), args[1])
  redis.call('HDEL', key(keys[1], 'abilities'), args[1])
  redis.call('HDEL', key(keys[1], 'tested'), args[1])
  return 'ok'
end

-- -> {{name, info_json...}, {names_json of each living worker...}, {worker, tested_json of each...}}
local function artifacts(keys)
  local p, now = keys[1], now_ms()
  local abilities, tested = {}, {}
  for _, worker in ipairs(redis.call('ZRANGE', key(p, 'workers'), text(now), '+inf', 'BYSCORE')) do
    abilities[#abilities + 1] = redis.call('HGET', key(p, 'abilities'), worker) or '[]'
    tested[#tested + 1] = worker
    tested[#tested + 1] = redis.call('HGET', key(p, 'tested'), worker) or '{}'
  end
  return { redis.call('HGETALL', key(p, 'artifacts')), abilities, tested }
end

-- id ttl     Files are about to be stored for a job that does not exist yet: if it never does, they are removed.
local function reserve(keys, args)
  redis.call('ZADD', key(keys[1], 'removals'), text(now_ms() + tonumber(args[2])), args[1])
  return 'ok'
end

-- visibility limit -> ids whose files are to be removed now; they come again after `visibility` ms unless forgotten
local function removals(keys, args)
  local p, now = keys[1], now_ms()
  local ids = redis.call('ZRANGE', key(p, 'removals'), '-inf', text(now), 'BYSCORE', 'LIMIT', 0, args[2])
  for _, id in ipairs(ids) do redis.call('ZADD', key(p, 'removals'), text(now + tonumber(args[1])), id) end
  return ids
end

-- id     Its files are gone; so is the job.
local function forget(keys, args)
  local p, id = keys[1], args[1]
  local job = job_of(p, id)
  if job and (job.status == 'queued' or job.status == 'running') then return 'alive' end
  for _, name in ipairs({ 'removals', 'jobs', 'dead' }) do redis.call('ZREM', key(p, name), id) end
  redis.call('DEL', key(p, 'job', id), key(p, 'events', id))
  return 'ok'
end

local function register(name, flag, callback)
  redis.register_function({ function_name = '@LIBRARY@_' .. name, callback = callback, flags = { flag } })
end

local function register_plain(name, callback) redis.register_function('@LIBRARY@_' .. name, callback) end

-- These begin work, and are refused when the server's memory is full.
register_plain('enqueue', enqueue)
register_plain('claim', claim)
register_plain('beat', beat)
register_plain('reserve', reserve)

-- These end work or free memory, and go through even then.
register('renew', 'allow-oom', renew)
register('finish', 'allow-oom', finish)
register('fail', 'allow-oom', fail)
register('release', 'allow-oom', release)
register('cancel', 'allow-oom', cancel)
register('leave', 'allow-oom', leave)
register('removals', 'allow-oom', removals)
register('forget', 'allow-oom', forget)
register('sweep', 'allow-oom', function(keys, args) return sweep(keys[1], now_ms(), tonumber(args[1])) end)

-- These only look, and go through even when nothing can be written.
register('precheck', 'no-writes', precheck)
register('list', 'no-writes', list)
register('stats', 'no-writes', stats)
register('artifacts', 'no-writes', artifacts)
register('get', 'no-writes', function(keys, args) return view(keys[1], args[1]) end)

-- One question: look at the ledger, and answer.

run = read_run()
local stopped = refused_by_state(unpack(CONTEXT, 1, 4))
if stopped then
  return stopped
end
return answer('ok', ask[ARGV[1]](unpack(cmsgpack.unpack(ARGV[3]), 1, MOST_ARGUMENTS)))
